"""Doubt, risk and coverage: curves worked out by hand, and a guaranteed risk that holds as often as it says."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scalabl.errors import CalibrationError
from scalabl.uncertainty.selective import aurc, binomial_upper_bound, guaranteed_threshold, risk_coverage


def test_the_risk_coverage_curve_is_the_running_error_rate_of_the_surest() -> None:
    doubt, wrong = torch.tensor([0.4, 0.1, 0.2, 0.3]), torch.tensor([True, False, False, True])
    assert risk_coverage(doubt, wrong).tolist() == pytest.approx([0, 0, 1 / 3, 2 / 4])
    assert aurc(doubt, wrong) == pytest.approx((1 / 3 + 1 / 2) / 4)


def test_inputs_of_equal_doubt_share_their_errors() -> None:
    wrong = torch.tensor([True, False, False, False])
    assert risk_coverage(torch.zeros(4), wrong).tolist() == pytest.approx([0.25] * 4)
    assert risk_coverage(torch.zeros(4), wrong.flip(0)).tolist() == pytest.approx([0.25] * 4)


@given(st.integers(0, 40), st.integers(1, 60), st.floats(0.001, 0.5))
def test_the_upper_bound_solves_the_binomial_tail(errors: int, more: int, delta: float) -> None:
    count = errors + more
    bound = binomial_upper_bound(errors, count, delta)
    tail = sum(math.comb(count, i) * bound**i * (1 - bound) ** (count - i) for i in range(errors + 1))
    assert tail == pytest.approx(delta, rel=1e-6)


def test_the_upper_bound_without_errors_is_the_closed_form_and_1_when_all_are_wrong() -> None:
    assert binomial_upper_bound(0, 59, 0.05) == pytest.approx(1 - 0.05 ** (1 / 59))
    assert binomial_upper_bound(7, 7, 0.05) == 1


def test_the_promised_risk_holds_as_often_as_promised_and_most_inputs_are_answered() -> None:
    # doubt u is uniform and P(wrong | u) = u^3, so that answering up to t has the true risk t^3 / 4
    repeats, broken, coverage = 400, 0, 0.0
    for seed in range(repeats):
        generator = torch.Generator().manual_seed(seed)
        doubt = torch.rand(600, generator=generator, dtype=torch.float64)
        wrong = torch.rand(600, generator=generator) < doubt**3
        found = guaranteed_threshold(doubt[:300], doubt[300:], wrong[300:], target_risk=0.1, confidence=0.9)
        broken += found.threshold**3 / 4 > 0.1
        coverage += found.coverage / repeats
        assert found.risk <= found.bound <= 0.1
    assert broken / repeats <= 0.1
    assert coverage > 0.5, "0.74 of the inputs could be answered with perfect knowledge"


def test_a_risk_that_cannot_be_had_says_what_can() -> None:
    doubt = torch.linspace(0, 1, 40, dtype=torch.float64)
    wrong = torch.zeros(40, dtype=torch.bool)
    with pytest.raises(CalibrationError, match=r"within 0\.05 with confidence 0\.9: the lowest that 40 rows can .* 0\.109"):
        guaranteed_threshold(doubt, doubt, wrong, target_risk=0.05, confidence=0.9)
    assert guaranteed_threshold(doubt, doubt, wrong, target_risk=0.11, confidence=0.9).coverage == 1


@pytest.mark.parametrize(
    ("errors", "count", "delta", "expected"), [(1, 10, 0.025, 0.4450), (5, 20, 0.025, 0.4910), (10, 100, 0.05, 0.1637)]
)
def test_the_upper_bound_is_that_of_printed_tables(errors: int, count: int, delta: float, expected: float) -> None:
    assert binomial_upper_bound(errors, count, delta) == pytest.approx(expected, abs=6e-5)
