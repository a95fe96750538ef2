"""Timing methods in turns, and summaries of the times: ratios and quantiles. What is timed is each benchmark's own."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np


def in_turns(
    methods: Mapping[str, Callable[[], object]], rounds: int, *, wait_for_others: bool = False
) -> dict[str, list[float]]:
    """Seconds of each method in each round. The methods take turns, so that a disturbance meets all of them alike.

    Args:
        wait_for_others: after each run, wait until other processes are idle. Threads of a server that has answered may
            go on for a while.
    """
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(rounds):
        for name, run in methods.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
            if wait_for_others:
                _wait_for_others()
    return seconds


def _wait_for_others(seconds: float = 30) -> None:
    """Return once no other process computes, or after so many seconds."""
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


def ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """How many times as long the one took as the other, round by round: the median over rounds, and the range."""
    ratios = [one / other for one, other in zip(slow, fast, strict=True)]
    return {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}


def ratio_text(ratio: dict[str, float]) -> str:
    """The median, and the range in brackets."""
    return f"{ratio['median']:.2f} ({ratio['lowest']:.2f}-{ratio['highest']:.2f})"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 95% and 99% quantile (each one of the values), and the ends."""
    p95, p99 = (float(value) for value in np.percentile(values, (95, 99), method="inverted_cdf"))
    return {"median": statistics.median(values), "p95": p95, "p99": p99, "lowest": min(values), "highest": max(values)}
