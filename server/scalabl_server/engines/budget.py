"""Measuring the token budget of a pass: where the throughput of a CPU stops growing, or what fits in a GPU's memory.

Larger passes would only add latency. Any engine in this process can use it: it passes a function that runs a pass.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from scalabl_server.batching.faults import classify
from scalabl_server.batching.selection import FIXED_SHARE

logger = logging.getLogger("scalabl")

UNMEASURED_CPU_TOKENS = 2048
LENGTH = 16  # tokens of each input in a measured pass; short, so that the smallest pass is small
SECONDS = 8.0  # time limit for measuring on a CPU
SURE_SECONDS, TIMES = 0.1, 5  # a pass size is timed until the sum reaches SURE_SECONDS, but at most TIMES times
FLAT = 0.02  # measuring ends when two sizes in a row gain less than this share over the best rate before them
MEMORY_SHARE = 0.8  # share of a GPU's memory that may be in use after a full pass; the rest is a reserve

RunPass = Callable[[int], None]  # runs a pass over this many tokens (rows x length)


@dataclass(frozen=True)
class Point:
    """A measured pass: its tokens, and the seconds it took or the bytes in use after it."""

    tokens: int
    amount: float

    @property
    def rate(self) -> float:
        return self.tokens / self.amount


def knee(points: Sequence[Point], within: float = FIXED_SHARE) -> int:
    """The fewest tokens whose rate is at most the share `within` below the best rate."""
    best = max(point.rate for point in points)
    return min(point.tokens for point in points if point.rate >= (1 - within) * best)


def room(points: Sequence[Point], allowed: float) -> int:
    """The most tokens that fit in `allowed` bytes, extrapolated linearly from the two largest passes; 0 if none fit."""
    small, large = points[-2:] if len(points) > 1 else (Point(0, 0.0), points[0])
    slope = (large.amount - small.amount) / (large.tokens - small.tokens)
    if slope <= 0:  # the allocator did not need more memory
        return large.tokens if large.amount <= allowed else 0
    return max(0, int(large.tokens + (allowed - large.amount) / slope))


def ladder(first: int, most: int) -> list[int]:
    """The sizes `first`, 2 `first`, 4 `first`, … up to `most`; always with `first` itself."""
    sizes = [first]
    while 2 * sizes[-1] <= most:
        sizes.append(2 * sizes[-1])
    return sizes


def measure_rates(
    run: RunPass, first: int, most: int, seconds: float = SECONDS, clock: Callable[[], float] = time.perf_counter
) -> list[Point]:
    """Time passes of doubling size, until the rate stops growing, the time is used up or `most` is reached.

    Args:
        seconds: limit on the time of all passes.
        clock: returns seconds.

    Raises:
        Exception: an error of the smallest pass, or another than out of memory. If a larger pass does not fit in memory,
            the list ends before it.
    """
    run(first)  # warm up: the first pass allocates memory
    until = clock() + seconds
    points: list[Point] = []
    for tokens in ladder(first, most):
        if points and clock() + 2 * points[-1].amount > until:
            break
        try:
            points.append(Point(tokens, _seconds_of(run, tokens, clock)))
        except Exception as error:
            if not points or classify(error).kind != "out-of-memory":
                raise
            break
        if len(points) > 2 and max(p.rate for p in points[-2:]) < (1 + FLAT) * max(p.rate for p in points[:-2]):
            break
    return points


def _seconds_of(run: RunPass, tokens: int, clock: Callable[[], float]) -> float:
    durations: list[float] = []
    while sum(durations) < SURE_SECONDS and len(durations) < TIMES:
        began = clock()
        run(tokens)
        durations.append(clock() - began)
    return min(durations)


def measure_memory(run: RunPass, used: Callable[[], int], first: int, most: int, allowed: float) -> list[Point]:
    """Measure the bytes in use after passes of doubling size, until the next would exceed `allowed` or one does not fit.

    Args:
        used: returns the bytes in use now, including the allocator's reserve.

    Raises:
        Exception: an error of the smallest pass, or another than out of memory.
    """
    points: list[Point] = []
    for tokens in ladder(first, most):
        if len(points) > 1 and room(points, allowed) < tokens:
            break
        try:
            run(tokens)
        except Exception as error:
            if not points or classify(error).kind != "out-of-memory":
                raise
            break
        points.append(Point(tokens, float(used())))
    return points


def find_budget(run: RunPass, device: torch.device, first: int, most: int) -> int:
    """Measure on the device up to how many tokens waiting inputs should share a pass, and log the result.

    Args:
        first: tokens of the smallest pass, with one input.
        most: the most tokens that a pass may have.
    """
    began = time.perf_counter()
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        points = measure_memory(run, lambda: total - torch.cuda.mem_get_info(device)[0], first, most, MEMORY_SHARE * total)
        tokens = max(first, min(most, room(points, MEMORY_SHARE * total)))
        torch.cuda.empty_cache()
        conclusion = (
            f"passes of {tokens} tokens fit in memory ({points[-1].tokens} tokens needed "
            f"{points[-1].amount - (total - free):.3g} bytes)"
        )
    else:
        points = measure_rates(run, first, most)
        # With only one of several points measured there is no knee to find: the machine was too busy for a second pass.
        cut_short = len(points) == 1 and len(ladder(first, most)) > 1
        tokens = min(most, max(first, UNMEASURED_CPU_TOKENS) if cut_short else knee(points))
        rates = ", ".join(f"{point.tokens}: {point.rate:.0f}" for point in points)
        conclusion = (
            f"passes of {tokens} tokens reach at least {1 - FIXED_SHARE:.0%} of the best rate "
            f"(tokens per second by size: {rates})"
        )
        if cut_short:
            conclusion = f"passes of {tokens} tokens by default: one of {first} took too long to measure a second one"
    logger.info(
        "token budget: %s; measured in %.1f s, set it with --target-batch-tokens", conclusion, time.perf_counter() - began
    )
    return tokens
