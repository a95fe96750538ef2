"""Whether the GPU computes what the CPU computes: first the kernel's tests, then models (`models`)."""

from __future__ import annotations

from benchmarks.gpu.parts import fused_tests
from benchmarks.gpu.record import Bench

SECONDS = 85.0  # of the kernel's tests


def measure(bench: Bench) -> None:
    """Compare, most important first."""
    tests = fused_tests.REHEARSED if bench.dry else fused_tests.CHOSEN
    bench.attempt("tests of the kernel", lambda: fused_tests.run(bench, tests, min(SECONDS, bench.left())))

    from benchmarks.gpu.parts import models  # not before the tests are forked: a fork must not inherit CUDA

    models.measure(bench)
