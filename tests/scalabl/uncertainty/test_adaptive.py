"""Sampling until it is enough: laws for any logits, the promise of the rules by simulation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor

from scalabl.model.posterior import SCHEMES, Scheme
from scalabl.uncertainty.adaptive import TARGETS, Estimate, Rule, sample_adaptively, settled, t_quantile
from scalabl.uncertainty.predictive import predictive


@st.composite
def tables(draw: DrawFn) -> Tensor:
    """Logits [B, 64, C] of inputs from hopeless to certain, with ties and with samples that all agree."""
    inputs, classes = draw(st.integers(1, 4)), draw(st.integers(2, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    centre = torch.randn(inputs, 1, classes, generator=generator) * draw(st.sampled_from([0.0, 0.3, 3.0, 30.0]))
    spread = torch.randn(inputs, 64, classes, generator=generator) * draw(st.sampled_from([0.0, 0.1, 1.0, 10.0]))
    return centre + spread


def _sampled(table: Tensor, rule: Rule, scheme: Scheme = "gaussian", temperature: float = 1.0) -> list[Estimate]:
    def run(going: Sequence[int], start: int, stop: int) -> Tensor:
        return table[list(going), start:stop]

    return sample_adaptively(run, len(table), rule, temperature=temperature, scheme=scheme)


@st.composite
def rules(draw: DrawFn, **fixed: Any) -> Rule:
    most = draw(st.sampled_from([1, 7, 8, 24, 50, 64]))
    first = min(most, draw(st.sampled_from([1, 2, 4, 8, 16])))
    fields = {"target": draw(st.sampled_from(TARGETS)), "tolerance": draw(st.sampled_from([1e-4, 0.01, 0.1, 0.9]))}
    return Rule(**{**fields, "first": first, "most": most, **fixed})


@given(tables(), rules(), st.sampled_from(SCHEMES), st.floats(0.5, 2))
@settings(deadline=None)
def test_an_input_has_the_answer_of_the_samples_at_which_it_stopped(
    table: Tensor, rule: Rule, scheme: Scheme, temperature: float
) -> None:
    for logits, found in zip(table, _sampled(table, rule, scheme, temperature), strict=True):
        assert found.num_samples in rule.rounds()
        assert found.num_samples <= rule.most
        assert found.settled or found.num_samples == rule.most
        whole = predictive(logits[: found.num_samples].unsqueeze(0), temperature, scheme)
        assert bool(settled(whole, rule, scheme)) == found.settled
        expected = whole.of_input(0)
        assert torch.equal(found.outcome.probabilities, expected.probabilities)
        assert torch.equal(found.outcome.mutual_information, expected.mutual_information)
        assert torch.equal(
            found.outcome.standard_error.probabilities.nan_to_num(), expected.standard_error.probabilities.nan_to_num()
        )


@given(tables(), rules(), st.sampled_from(SCHEMES), st.tuples(st.floats(1e-5, 0.9), st.floats(1e-5, 0.9)))
@settings(deadline=None)
def test_a_smaller_tolerance_never_takes_fewer_samples(
    table: Tensor, rule: Rule, scheme: Scheme, tolerances: tuple[float, float]
) -> None:
    strict, loose = (
        _sampled(table, Rule(rule.target, tolerance, rule.first, rule.most), scheme) for tolerance in sorted(tolerances)
    )
    for one, other in zip(strict, loose, strict=True):
        assert one.num_samples >= other.num_samples


@given(tables(), rules(), st.sampled_from(SCHEMES))
@settings(deadline=None)
def test_a_number_that_is_settled_has_the_standard_error_asked_for(table: Tensor, rule: Rule, scheme: Scheme) -> None:
    for found in _sampled(table, rule, scheme):
        if found.settled and rule.target != "decision":
            assert float(getattr(found.outcome.standard_error, rule.target).max()) <= max(rule.allowed, 1e-6)


def test_each_round_runs_only_what_goes_on() -> None:
    certain, doubtful = torch.tensor([9.0, 0.0]).expand(64, 2), torch.tensor([[3.0, 0.0], [0.0, 3.0]]).repeat(32, 1)
    table, calls = torch.stack([doubtful, certain, doubtful]), []

    def run(going: Sequence[int], start: int, stop: int) -> Tensor:
        calls.append((list(going), start, stop))
        return table[list(going), start:stop]

    found = sample_adaptively(run, 3, Rule(first=8, most=64))
    assert calls == [([0, 1, 2], 0, 8), ([0, 2], 8, 16), ([0, 2], 16, 32), ([0, 2], 32, 64)]
    assert [(each.num_samples, each.settled) for each in found] == [(64, False), (8, True), (64, False)]


@pytest.mark.parametrize("target", TARGETS)
def test_samples_that_agree_are_enough_in_the_first_round_even_for_a_tie(target: Any) -> None:
    (found,) = _sampled(torch.zeros(1, 64, 3), Rule(target))
    assert (found.num_samples, found.settled) == (8, True)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_has_no_standard_error_is_never_settled(scheme: Scheme) -> None:
    table = torch.zeros(1, 64, 3)
    assert _sampled(table, Rule(first=1, most=1), scheme)[0].settled is False
    assert _sampled(table, Rule(first=1, most=64), scheme)[0].num_samples == (4 if scheme == "antithetic" else 2)


def test_one_contrary_sample_could_overturn_a_narrow_lead() -> None:
    # A lead of 0.1 with next to no spread: at 8 samples one of -1 would be enough to turn it, at 16 no longer.
    p = torch.full((64,), 0.55) + 1e-4 * torch.arange(64).remainder(2)
    table = torch.stack([p.log(), (1 - p).log()], dim=1).unsqueeze(0)
    assert _sampled(table, Rule())[0].num_samples == 16


def test_a_decision_is_separated_from_every_other_choice() -> None:
    # The runner-up lags by little but steadily; the third now and then leads by far.
    steady = torch.tensor([0.45, 0.30, 0.25]).repeat(64, 1) + 1e-3 * torch.arange(64 * 3).view(64, 3).sin()
    seldom = steady.clone()
    seldom[::3] = torch.tensor([0.15, 0.05, 0.80])
    steady_k, seldom_k = (_sampled(table.log().unsqueeze(0), Rule(most=32))[0].num_samples for table in (steady, seldom))
    assert (steady_k, seldom_k) == (8, 32)


@pytest.mark.parametrize("lead", [0.0, 0.03, 0.1])
@pytest.mark.parametrize("deviation", [0.1, 0.3])
def test_stopping_at_the_wrong_choice_is_as_rare_as_promised(lead: float, deviation: float) -> None:
    inputs, tolerance = 2000, 0.1
    generator = torch.Generator().manual_seed(3)
    difference = lead + deviation * torch.randn(inputs, 64, generator=generator)  # the second choice's over the first's
    p = ((1 - difference) / 2).clamp(1e-4, 1 - 1e-4)
    found = _sampled(torch.stack([p.log(), (1 - p).log()], -1), Rule(tolerance=tolerance))
    wrong = sum(each.settled and each.outcome.probabilities[0] > each.outcome.probabilities[1] for each in found)
    # With no lead at all both choices are right; counting one of the two sides leaves the promise as it is.
    assert wrong / inputs <= tolerance
    if lead == 0.1:
        assert sum(each.settled for each in found) / inputs > 0.5


def test_members_that_differ_much_but_steadily_need_few_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    lead = torch.tensor([3.0, -1.0, 2.0]).repeat(24).expand(20, 72) + 0.02 * torch.randn(20, 72, generator=generator)
    table = torch.stack([lead, torch.zeros_like(lead)], -1)
    rule = Rule(first=9, most=72)
    known, unknown = (
        sample_adaptively(lambda going, start, stop: table[list(going), start:stop], 20, rule, members=members)
        for members in (3, 1)
    )
    assert {each.num_samples for each in known} == {9}
    assert min(each.num_samples for each in unknown) > 18


@pytest.mark.parametrize("target", ["probabilities", "mutual_information"])
def test_the_interval_at_the_stop_holds_the_truth_as_often_as_promised(target: Any) -> None:
    inputs, tolerance = 2000, 0.04
    z = torch.randn(inputs, 64, 3, generator=torch.Generator().manual_seed(4)) + torch.tensor([1.0, 0.0, -0.5])
    many = predictive(
        torch.randn(1, 400_000, 3, generator=torch.Generator().manual_seed(5)) + torch.tensor([1.0, 0.0, -0.5])
    )
    truth = getattr(many, target)[0]
    stopped = [each for each in _sampled(z, Rule(target, tolerance)) if each.settled]
    assert len(stopped) > inputs / 2
    assert {each.num_samples for each in stopped} - {64}, "some stop early"
    misses = torch.stack([(getattr(each.outcome, target) - truth).abs() > 1.96 * tolerance for each in stopped])
    assert float(misses.sum(0).max()) / inputs <= 0.05


@pytest.mark.parametrize("tail", [0.5, 0.1, 0.025, 1e-3, 2e-5])
@pytest.mark.parametrize("degrees", [1, 2, 3, 7, 8, 15, 63, 255])
def test_quantiles_are_students(degrees: int, tail: float) -> None:
    t = t_quantile(tail, degrees)
    beyond = mpmath.betainc(degrees / 2, 0.5, 0, degrees / (degrees + t**2), regularized=True) / 2
    assert float(beyond) == pytest.approx(tail, rel=1e-8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target": "entropy"}, "target is 'entropy'; use one of decision"),
        ({"tolerance": 0.0}, "tolerance is 0.0"),
        ({"tolerance": 1.0}, "below 1 for a decision"),
        ({"target": "probabilities", "tolerance": math.nan}, "tolerance is nan"),
        ({"first": 0}, "first is 0 and most is 64; first must be"),
        ({"first": 16, "most": 8}, "first is 16 and most is 8; first must be"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Rule(**fields)


@pytest.mark.parametrize(
    ("degrees", "tail", "expected"),
    [(1, 0.025, 12.706), (2, 0.05, 2.920), (5, 0.005, 4.032), (10, 0.025, 2.228), (30, 0.001, 3.385), (120, 0.1, 1.289)],
)
def test_quantiles_are_those_of_printed_tables(degrees: int, tail: float, expected: float) -> None:
    assert t_quantile(tail, degrees) == pytest.approx(expected, abs=6e-4)


def test_quantiles_of_one_and_two_degrees_are_the_closed_forms() -> None:
    for tail in (0.4, 0.01, 1e-6):
        assert t_quantile(tail, 1) == pytest.approx(1 / math.tan(math.pi * tail), rel=1e-9)
        assert t_quantile(tail, 2) == pytest.approx((1 - 2 * tail) / math.sqrt(2 * tail * (1 - tail)), rel=1e-9)
