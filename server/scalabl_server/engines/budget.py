"""The token budget of a pass, found by measuring: where a CPU's throughput stops growing, or what a GPU's memory holds.

Larger passes than that would only add latency. The choice among measured points is pure; what is measured is a function that
runs a pass, so that any engine in this process can use it.
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
LENGTH = 16  # tokens of the inputs that are run to measure: short, so that the smallest pass is small
SECONDS = 8.0  # for all passes on a CPU, expected ones too
SURE_SECONDS, TIMES = 0.1, 5  # passes shorter than that are timed again, so often at most
FLAT = 0.02  # of the best rate before; two sizes in turn that gain less than that are the end
MEMORY_SHARE = 0.8  # of a GPU's memory, that a full pass may lead to; the rest is for what passes differ in

RunPass = Callable[[int], None]  # of so many tokens (rows x length)


@dataclass(frozen=True)
class Point:
    """A pass that was measured: its tokens, and seconds or bytes."""

    tokens: int
    amount: float

    @property
    def rate(self) -> float:
        return self.tokens / self.amount


def knee(points: Sequence[Point], within: float = FIXED_SHARE) -> int:
    """The fewest tokens whose rate is within a share of the best rate."""
    best = max(point.rate for point in points)
    return min(point.tokens for point in points if point.rate >= (1 - within) * best)


def room(points: Sequence[Point], allowed: float) -> int:
    """The most tokens within so many bytes, by the line through the two largest passes; 0 where not even its start fits."""
    small, large = points[-2:] if len(points) > 1 else (Point(0, 0.0), points[0])
    slope = (large.amount - small.amount) / (large.tokens - small.tokens)
    if slope <= 0:  # the allocator has not had to grow
        return large.tokens if large.amount <= allowed else 0
    return max(0, int(large.tokens + (allowed - large.amount) / slope))


def ladder(first: int, most: int) -> list[int]:
    """`first`, twice that, …, and never above `most` but for the first."""
    sizes = [first]
    while 2 * sizes[-1] <= most:
        sizes.append(2 * sizes[-1])
    return sizes


def measure_rates(
    run: RunPass, first: int, most: int, seconds: float = SECONDS, clock: Callable[[], float] = time.perf_counter
) -> list[Point]:
    """Times of ever larger passes, until the rate stays, the next would take too long or there are enough.

    Args:
        clock: in seconds.

    Raises:
        Exception: what the smallest pass raises; a larger one that does not fit in memory ends the list.
    """
    run(first)  # the first of all allocates
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
    taken: list[float] = []
    while sum(taken) < SURE_SECONDS and len(taken) < TIMES:
        began = clock()
        run(tokens)
        taken.append(clock() - began)
    return min(taken)


def measure_memory(run: RunPass, used: Callable[[], int], first: int, most: int, allowed: float) -> list[Point]:
    """Bytes in use after ever larger passes, until the next would be above `allowed`, or one did not fit.

    Args:
        used: bytes that are taken now, the allocator's reserve among them.

    Raises:
        Exception: what the smallest pass raises.
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
    """Tokens up to which waiting inputs should share a pass, found on the device that runs them, and said in the log.

    Args:
        first: of the smallest pass, one input.
        most: that a pass may have.
    """
    began = time.perf_counter()
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        points = measure_memory(run, lambda: total - torch.cuda.mem_get_info(device)[0], first, most, MEMORY_SHARE * total)
        tokens = max(first, min(most, room(points, MEMORY_SHARE * total)))
        torch.cuda.empty_cache()
        conclusion = (
            f"memory holds passes of {tokens} tokens ({points[-1].tokens} took {points[-1].amount - (total - free):.3g} B)"
        )
    else:
        points = measure_rates(run, first, most)
        # One point of several has no knee: the machine was too busy for a second pass.
        cut_short = len(points) == 1 and len(ladder(first, most)) > 1
        tokens = min(most, max(first, UNMEASURED_CPU_TOKENS) if cut_short else knee(points))
        rates = ", ".join(f"{point.tokens}: {point.rate:.0f}" for point in points)
        conclusion = (
            f"passes of {tokens} tokens come within {FIXED_SHARE:.0%} of the best rate (tokens per second by size: {rates})"
        )
        if cut_short:
            conclusion = f"passes of {tokens} tokens, unmeasured: one of {first} took too long for a second"
    logger.info("%s; measured in %.1f s, --target-batch-tokens sets it", conclusion, time.perf_counter() - began)
    return tokens
