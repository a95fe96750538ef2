"""The test martingale on the novelty of real queries: no false alarm in ten thousand, and a change is noticed soon.

Computing the scores of 11,600 queries takes about ten minutes on one core; they are kept in `build`.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.results.drift import scores_of, simulate

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[3]
RUNS = 100


def test_it_stays_below_100_without_a_change_and_passes_it_soon_after_one(shared: Path) -> None:
    base = os.environ.get("SCALABL_EXAMPLE_BASE")
    if base is None:
        pytest.skip("SCALABL_EXAMPLE_BASE is not set; run `make integration`, which fetches the example's base model")
    found = simulate(scores_of(base, shared / "data", ROOT / "build" / "drift-scores.json"), RUNS)
    print(f"\n{found.false_alarms} false alarms, noticed in {found.noticed} of {RUNS} runs")
    assert found.false_alarms <= 0.01 * RUNS
    assert found.noticed >= 0.95 * RUNS
