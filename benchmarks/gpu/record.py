"""The JSON file of one part: it is replaced as a whole after every result, so that it is valid whenever the part is stopped.

Starting and stopping parts is in `supervision`.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RUNNING, DONE, FAILED, TIMED_OUT = "running", "done", "failed", "timed out"


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file; whoever reads it sees the old content or the new one."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(new, path)


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file that holds an object; an empty one if there is no such file."""
    if not path.exists():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


@dataclass
class Bench:
    """What a part is given: where its results go, how much time it has, and whether it only rehearses.

    Attributes:
        name: of the part.
        path: its JSON file.
        scratch: a folder for its temporary files.
        dry: tiny shapes on the CPU, with the Triton kernel in its interpreter; the numbers mean nothing.
        deadline: when it has to end, in seconds of `time.monotonic`.
    """

    name: str
    path: Path
    scratch: Path
    dry: bool
    deadline: float
    results: dict[str, Any] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def left(self) -> float:
        """Seconds until the part has to end."""
        return self.deadline - time.monotonic()

    def save(self, status: str = RUNNING) -> None:
        """Write the file."""
        content = {"part": self.name, "dry_run": self.dry, "status": status, "failures": self.failures}
        write_json(self.path, content | {"results": self.results})

    def put(self, name: str, value: Any) -> None:
        """Keep one result."""
        self.results[name] = value
        self.save()

    def add(self, name: str, row: Any) -> None:
        """Keep one more row of a table."""
        self.results.setdefault(name, []).append(row)
        self.save()

    def attempt(self, step: str, work: Callable[[], object]) -> None:
        """Run one step of the part. An error is kept and printed, and the steps after it run all the same."""
        began = time.monotonic()
        if self.left() <= 0:
            self.add("left_out", step)
            return
        try:
            work()
        except Exception as error:
            traceback.print_exc()
            last = "".join(traceback.format_exception(error))[-2000:]
            self.failures.append({"step": step, "error": f"{type(error).__name__}: {error}"[:1000], "traceback": last})
        print(f"{self.name}: {step}: {time.monotonic() - began:.1f} s", flush=True)
        self.save()

    def while_time(self, step: str, items: Iterable[Any], reserve: float = 0) -> Iterator[Any]:
        """The items, until less than `reserve` seconds are left; how many were left out is kept."""
        remaining = list(items)
        while remaining and self.left() > reserve:
            yield remaining.pop(0)
        if remaining:
            self.add("left_out", f"{step}: {len(remaining)} of the last measurements")
