"""The remaining tests of the kernel, in the time that the other parts left."""

from __future__ import annotations

from benchmarks.gpu.parts import fused_tests
from benchmarks.gpu.record import Bench


def measure(bench: Bench) -> None:
    """Run all of them, the ones of `correctness` again, which are compiled by now."""
    tests = fused_tests.REHEARSED[1:] if bench.dry else [fused_tests.FILE]
    bench.attempt("all tests of the kernel", lambda: fused_tests.run(bench, tests, bench.left()))
