"""Correctness, kernel, engine, server and a profile on this machine's GPU, each with a time limit, most important first.

bash benchmarks/gpu/run.sh [--dry-run] [--output build/gpu/out] [--only correctness,kernel] [--seconds 410]

Each part is a process of its own. It writes PART.json after every result, and its output goes to gpu.log; run.json says how
each part ended. A part that fails or takes too long does not stop the next ones, and what was written stays valid when the
whole is killed. `--dry-run` does the same on a CPU with tiny shapes, the parts about the kernel in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.gpu import record, supervision
from benchmarks.gpu.page import Run, run_section
from benchmarks.gpu.record import Bench, read_json, write_json
from benchmarks.parts import add_only, chosen_parts

# Part -> its time limit in seconds; `more` has what time is left. Each is a module in `parts` with a function `measure`.
PARTS = {"correctness": 110.0, "kernel": 80.0, "engine": 120.0, "server": 60.0, "profile": 30.0, "more": 0.0}
SECONDS = 410.0  # of all parts
# What several parts import: in a dry run once for all of them, as their processes are forked. On a GPU nothing is imported
# before the fork, since a module that asks for the GPU makes CUDA unusable in forked processes.
PRELOADED = ("torch", "transformers.models.llama.modeling_llama", "pydantic")
# Parts of a dry run with the kernel in Triton's interpreter; the others have the plain form, as a server on a CPU.
INTERPRETED = ("correctness", "kernel", "more")
INTERPRETER = {"TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "1"}  # set before Triton is imported
SHOWN = 5  # failures of a part that are printed
LEAST = 15.0  # seconds that are worth another part
DRY_SECONDS = 240.0  # of each part of a dry run: it may share a slow machine


def main() -> None:
    """Run the parts; exit with 1 if one of them did not end well."""
    options = _options()
    if options.dry_run:
        os.environ |= INTERPRETER | {"CUDA_VISIBLE_DEVICES": ""}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    options.output.mkdir(parents=True, exist_ok=True)
    for name in PARTS:
        (options.output / f"{name}.json").unlink(missing_ok=True)
    log = options.output / "gpu.log"
    log.write_bytes(b"")
    run = Session(options.output, log, options.dry_run, options.seconds)
    for module in PRELOADED if options.dry_run else ():
        with suppress(ImportError):  # the parts that need it will fail, and only they
            importlib.import_module(module)
    supervision.limited(run.describe, 60, log)
    for name in chosen_parts(options.parser, options.only, PARTS):
        run.part(name)
    print("\n" + run.section())
    sys.exit(0 if run.well else 1)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bash benchmarks/gpu/run.sh", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU; the numbers mean nothing")
    parser.add_argument("--output", type=Path, default=Path("build/gpu/out"), help="a folder for the results")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of all parts together")
    add_only(parser, PARTS)
    options = parser.parse_args()
    options.parser = parser
    return options


class Session:
    """One run of the parts, and run.json."""

    def __init__(self, output: Path, log: Path, dry: bool, seconds: float) -> None:
        self._output, self._log, self._dry = output, log, dry
        self._until = time.monotonic() + (len(PARTS) * DRY_SECONDS if dry else seconds)
        self._parts: dict[str, Any] = {}
        self.well = True
        (output / "run.json").unlink(missing_ok=True)

    def describe(self) -> None:
        """Find out what machine this is, in the child process that may use the GPU."""
        from benchmarks.gpu.machine import describe

        write_json(self._output / "run.json", {"dry_run": self._dry, "machine": describe(), "parts": {}})

    def part(self, name: str) -> None:
        """Run one part, and note how it ended."""
        left = self._until - time.monotonic()
        limit = DRY_SECONDS if self._dry else min(left, PARTS[name] or left)
        if limit < LEAST:
            self._note(name, {"status": "left out", "seconds": 0.0})
            return
        with self._log.open("a", encoding="utf-8") as log:
            log.write(f"\n===== {name}, at most {limit:.0f} s =====\n")
        path, began = self._output / f"{name}.json", time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            bench = Bench(name, path, Path(scratch), self._dry, deadline=began + limit - 3)
            code = supervision.limited(_part(bench), limit, self._log)
        seconds = time.monotonic() - began
        content = read_json(path) or {"part": name, "dry_run": self._dry, "failures": [], "results": {}}
        if content.get("status") not in (record.DONE, record.FAILED):
            content["status"] = record.TIMED_OUT if code is None else record.FAILED
        if code not in (0, None) and not content["failures"]:
            content["failures"] = [{"step": "the process", "error": f"ended with {code}; see gpu.log", "traceback": ""}]
        write_json(path, content | {"seconds": seconds, "limit": limit})
        self._note(name, {"status": content["status"], "seconds": seconds, "failures": content["failures"]})

    def section(self) -> str:
        """All results as the section of docs/gpu.md."""
        parts = {name: read_json(self._output / f"{name}.json") for name in self._parts}
        return run_section(Run(self._output.name, read_json(self._output / "run.json"), parts))

    def _note(self, name: str, ending: dict[str, Any]) -> None:
        self._parts[name] = ending
        self.well = self.well and ending["status"] == record.DONE
        run = {"machine": {}} | read_json(self._output / "run.json")
        write_json(self._output / "run.json", run | {"dry_run": self._dry, "parts": self._parts})
        print(f"{name:<12} {ending['status']:<10} {ending['seconds']:6.1f} s", flush=True)
        failures = ending.get("failures", [])
        for failure in failures[:SHOWN]:
            print(f"    {failure['step']}: {failure['error']}", flush=True)
        if len(failures) > SHOWN:
            print(f"    and {len(failures) - SHOWN} more", flush=True)


def _part(bench: Bench) -> Callable[[], None]:
    """What the child process of a part does. It imports the module, so that a missing package fails that part only."""

    def work() -> None:
        if bench.dry and bench.name not in INTERPRETED:
            os.environ.pop("TRITON_INTERPRET")  # before the dispatcher is imported, which looks at it
        bench.save()
        bench.attempt("the part", lambda: importlib.import_module(f"benchmarks.gpu.parts.{bench.name}").measure(bench))
        bench.save(record.FAILED if bench.failures else record.DONE)

    return work


if __name__ == "__main__":
    main()
