"""Methods that take turns, so that what else the machine does meets all of them alike."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path


def in_turns(methods: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each method in each round; every method has run once before."""
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, run in methods.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
            _wait_for_others()
    return seconds


def _wait_for_others(seconds: float = 30) -> None:
    """Until no other process computes: threads of a server that has answered may spin on for a while."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        before = _busy_ticks()
        time.sleep(0.1)
        if _busy_ticks() - before < 0.03 * os.sysconf("SC_CLK_TCK"):  # of 0.1 s on each core
            return


def _busy_ticks() -> int:
    """What all cores have computed since the machine's start, in ticks."""
    user, nice, system = Path("/proc/stat").read_text(encoding="ascii").split(maxsplit=4)[1:4]
    return int(user) + int(nice) + int(system)
