"""Seconds of work on a device, and what the device can do at most: copies, matrix products, one launch."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache

import torch


def seconds_of(function: Callable[[], object], device: str, *, milliseconds: int = 40) -> float:
    """The median time of a function's work, with a cold second-level cache; on a CPU the time of one call.

    Args:
        milliseconds: how long to repeat it on a GPU.
    """
    if device == "cpu":
        function()
        began = time.perf_counter()
        function()
        return time.perf_counter() - began
    from triton.testing import do_bench

    return float(do_bench(function, warmup=10, rep=milliseconds, return_mode="median")) / 1e3


def replayed_seconds(function: Callable[[], object], device: str) -> float:
    """The median time of a function's work in replays of a CUDA graph, which leaves out what the host does for a launch."""
    if device == "cpu":
        return seconds_of(function, device)
    from triton.testing import do_bench_cudagraph

    return float(do_bench_cudagraph(function, rep=20, return_mode="median")) / 1e3


def waiting(function: Callable[[], object], device: str) -> Callable[[], object]:
    """The function, which also waits until the device has done its work."""

    def run() -> object:
        result = function()
        if device != "cpu":
            torch.cuda.synchronize()
        return result

    return run


@dataclass(frozen=True)
class Ceilings:
    """What was measured as the most that a device does.

    Attributes:
        bandwidth: bytes per second of a large copy within the device's memory, read and written bytes together.
        half: operations per second of a large bfloat16 matrix product of random numbers.
        launch: seconds of the smallest kernel.
    """

    bandwidth: float
    half: float
    launch: float

    def seconds(self, moved: float, operations: float) -> float:
        """The longer of the times for so many bytes and for so many operations in bfloat16."""
        return max(moved / self.bandwidth, operations / self.half)

    def as_json(self) -> dict[str, float]:
        return asdict(self)


@cache
def ceilings(device: str) -> Ceilings:
    """Measured once in a process; takes less than a second on a GPU."""
    tiny = device == "cpu"
    size, width = (2**16, 64) if tiny else (2**31, 8192)
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = seconds_of(lambda: target.copy_(source), device, milliseconds=100)
    one, other = (torch.randn(width, width, device=device).to(torch.bfloat16) for _ in range(2))
    product = seconds_of(lambda: one @ other, device, milliseconds=100)
    small = torch.zeros(1, device=device)
    return Ceilings(2 * size / copy, 2 * width**3 / product, seconds_of(lambda: small.add_(1), device))
