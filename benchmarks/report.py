"""The lines that a benchmark prints and the numbers behind them, saved as text and JSON. Figures are drawn elsewhere."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe

Line = Callable[[str], None]


class Report:
    """Begins with a line about the machine, its threads and its load average.

    Args:
        name: of the two files.
        folder: where they go; None: they are not written.
    """

    def __init__(self, name: str, folder: Path | None) -> None:
        self._name, self._folder, self._lines = name, folder, list[str]()
        machine, threads, load = describe(), torch.get_num_threads(), os.getloadavg()[0]
        self.results: dict[str, Any] = {"machine": machine, "threads": threads, "load_at_start": load}
        self.line(f"{machine}, {threads} threads; load average at the start {load:.1f}")

    def line(self, text: str) -> None:
        """Print a line and remember it for `save`."""
        print(text, flush=True)
        self._lines.append(text)

    def save(self) -> None:
        """Write NAME.txt and NAME.json, if there is a folder for them."""
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / f"{self._name}.txt").write_text("\n".join(self._lines) + "\n", encoding="utf-8")
            (self._folder / f"{self._name}.json").write_text(json.dumps(self.results, indent=2) + "\n", encoding="utf-8")
