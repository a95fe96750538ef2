"""Runs the tests of the Triton kernel on this device and counts their outcomes, as far as the time goes."""

from __future__ import annotations

import importlib.util
import json
import os
from collections import Counter
from itertools import product
from pathlib import Path

import pytest

from benchmarks.gpu.record import Bench
from benchmarks.gpu.supervision import limited

ROOT = Path(__file__).resolve().parents[3]
FILE = "tests/kernels/test_fused.py"
WORKERS = 8  # compiling is work of the CPU

# Each compiles few kernels: few and many rows, widths that vectors fit into or not, all dtypes, the usual ranks.
CHOSEN = [
    *(
        f"{FILE}::test_it_is_the_formula[{rows}-{width}-{rank}-torch.{dtype}]"
        for dtype, rows, width, rank in product(("bfloat16", "float32", "float16"), (1, 300), (64, 200), (8, 64))
    ),
    f"{FILE}::test_any_stride_is_read_and_written_in_its_place",
    f"{FILE}::test_rows_that_share_an_input_bring_it_once",
    f"{FILE}::test_each_row_has_its_adapter",
    f"{FILE}::test_gradients_come_from_the_plain_form",
]
REHEARSED = [
    f"{FILE}::test_it_is_the_formula[7-64-8-torch.bfloat16]",
    f"{FILE}::test_gradients_come_from_the_plain_form",
]


class OutcomeLog:
    """A pytest plugin that appends each test's outcome to a file, which stays when the run is stopped."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            row = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
            if report.outcome == "failed":
                row["message"] = report.longreprtext[-2000:]
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def run(bench: Bench, tests: list[str], seconds: float) -> None:
    """Run these tests and keep how many passed, failed and were skipped, and what the failed ones said.

    Raises:
        AssertionError: a test failed, or none passed.
    """
    outcomes = bench.scratch / "outcomes.jsonl"

    def work() -> None:
        os.environ.pop("PYTEST_ADDOPTS", None)
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # none of them is needed, and some take seconds to load
        os.chdir(ROOT)
        arguments = ["-p", "no:cacheprovider", "-W", "default", "--strict-markers", "-m", "fused", *tests]
        if not bench.dry and importlib.util.find_spec("xdist"):
            arguments += ["-p", "xdist", "-n", str(min(WORKERS, os.cpu_count() or 1))]
        raise SystemExit(int(pytest.main(arguments, plugins=[OutcomeLog(outcomes)])))

    code = limited(work, seconds)
    rows = [json.loads(line) for line in outcomes.read_text(encoding="utf-8").splitlines()] if outcomes.exists() else []
    counts = Counter(row["outcome"] for row in rows)
    failed = [row for row in rows if row["outcome"] == "failed"]
    bench.put("fused", {"counts": counts, "finished": code is not None, "exit_code": code, "failed": failed[:20]})
    assert not failed, f"{len(failed)} tests failed, first {failed[0]['test']}"
    assert counts["passed"], f"no test passed; pytest ended with {code}"
