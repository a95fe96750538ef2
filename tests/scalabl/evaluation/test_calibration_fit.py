"""The fit finds what made the data and is never worse than none; where rows cannot tell, scale and temperature stay 1."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scalabl.evaluation.calibration_fit import MIN_ERRORS, CheckedFit, checked_fit, fit_scale, minimise, mixture_nll
from scalabl.uncertainty.predictive import predictive


def _world(rows: int, samples: int = 16, seed: int = 0) -> tuple[Tensor, Tensor, torch.Generator]:
    """Mean logits [N, 1, 4] and deviations [N, K, 4] of a posterior whose scale is free."""
    generator = torch.Generator().manual_seed(seed)
    mean = 2 * torch.randn(rows, 1, 4, generator=generator)
    spread = torch.rand(rows, 1, 1, generator=generator) * 2
    return mean, spread * torch.randn(rows, samples, 4, generator=generator), generator


def _answers(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    p = torch.softmax(logits / temperature, -1).mean(1)
    return torch.multinomial(p, 1, generator=generator)[:, 0]


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.3])
def test_the_temperature_that_made_the_answers_is_found(temperature: float) -> None:
    mean, _, generator = _world(20_000)
    answers = _answers(mean, temperature, generator)
    found, _ = minimise(lambda t: mixture_nll(mean, answers, t), (0.2, 1.0, 5.0), 1e-4)
    assert found == pytest.approx(temperature, rel=0.04)


@pytest.mark.parametrize(("scale", "temperature"), [(0.6, 1.0), (1.7, 1.0), (1.3, 1.6)])
def test_the_scale_and_temperature_that_made_the_answers_are_found(scale: float, temperature: float) -> None:
    mean, deviation, generator = _world(8_000, 8)
    answers = _answers(mean + scale * deviation, temperature, generator)
    best = fit_scale(lambda tau: mean + tau * deviation, answers, tolerance=0.05).best
    assert best.posterior_scale == pytest.approx(scale, rel=0.12)
    assert best.temperature == pytest.approx(temperature, rel=0.08)


@settings(max_examples=15)
@given(st.integers(0, 2**31))
def test_a_fit_is_never_worse_than_none_and_knows_its_own_logits(seed: int) -> None:
    mean, deviation, generator = _world(40, 4, seed)
    answers = torch.randint(4, (40,), generator=generator)
    fit = fit_scale(lambda tau: mean + tau * deviation, answers)
    assert fit.best.nll <= mixture_nll(mean + deviation, answers, 1.0)
    assert torch.equal(fit.logits, mean + fit.best.posterior_scale * deviation)
    assert mixture_nll(fit.logits, answers, fit.best.temperature) == pytest.approx(fit.best.nll)


def test_a_scale_that_the_data_do_not_tell_from_the_trained_one_is_left_alone() -> None:
    mean, deviation, generator = _world(300, 8)
    answers = _answers(mean + deviation, 1.0, generator)
    fit = fit_scale(lambda tau: mean + tau * deviation, answers)
    lowest = min(fit.trials, key=lambda trial: trial.nll)
    assert lowest.posterior_scale != 1, "by chance another fits these rows a little better"
    assert fit.best.posterior_scale == 1
    assert torch.equal(fit.logits, mean + deviation)
    assert fit.best.nll - lowest.nll < 0.01


def test_the_nll_is_that_of_the_predictive() -> None:
    mean, deviation, generator = _world(50, 8)
    logits, answers = mean + deviation, torch.randint(4, (50,), generator=generator)
    p = predictive(logits, temperature=1.4).probabilities.gather(1, answers.unsqueeze(1))
    assert mixture_nll(logits, answers, 1.4) == pytest.approx(-float(p.log().mean()))


def test_minimise_takes_the_lowest_of_several_valleys_and_an_edge_when_that_is_lowest() -> None:
    point, lowest = minimise(lambda x: min((x - 1) ** 2 + 2, (x - 7) ** 2), (0.5, 1.0, 2.0, 4.0, 8.0), 1e-6)
    assert point == pytest.approx(7, abs=1e-4)
    assert lowest == pytest.approx(0, abs=1e-6)
    assert minimise(lambda x: x, (0.5, 1.0, 2.0), 1e-3) == (0.5, 0.5)


@pytest.mark.parametrize("best", [0.13, 1.0, 2.9, 7.7])
def test_minimise_knows_the_point_within_its_tolerance_after_few_evaluations(best: float) -> None:
    asked: list[float] = []

    def loss(x: float) -> float:
        asked.append(x)
        return (math.log(x) - math.log(best)) ** 4  # flat at the bottom

    grid = (0.1, 0.3, 1.0, 3.0, 10.0)
    point, lowest = minimise(loss, grid, 0.05)
    assert math.log(point) == pytest.approx(math.log(best), abs=0.05)
    assert lowest == min(loss(x) for x in asked.copy())
    assert len(set(asked)) <= len(grid) + 20


def _checked(mean: Tensor, deviation: Tensor, answers: Tensor) -> CheckedFit:
    """A checked fit on the even rows, with the odd rows as the others."""
    fit, other = slice(0, None, 2), slice(1, None, 2)
    return checked_fit(
        lambda tau: mean[fit] + tau * deviation[fit],
        answers[fit],
        lambda tau: mean[other] + tau * deviation[other],
        answers[other],
    )


def test_a_clear_fit_is_kept_and_says_from_what() -> None:
    mean, deviation, generator = _world(2_000, 8)
    fit = _checked(mean, deviation, _answers(mean + deviation, 2.0, generator))
    assert fit.temperature == pytest.approx(2, rel=0.15)
    assert torch.equal(fit.after, mean[1::2] + fit.posterior_scale * deviation[1::2])
    assert f"temperature {fit.temperature:.2f} from 1000 rows" in fit.summary
    assert "bound" not in fit.summary


def test_rows_that_are_all_right_leave_temperature_1_after_one_pass_and_say_why() -> None:
    mean, deviation, _ = _world(114, 8)
    fit = _checked(mean, deviation, predictive(mean + deviation).probabilities.argmax(-1))
    assert (fit.posterior_scale, fit.temperature, fit.trials) == (1, 1, [])
    assert fit.few_errors
    assert f"stay 1: 0 of the 57 rows to fit are answered wrong, and fewer than {MIN_ERRORS} errors" in fit.summary


def test_a_fit_that_makes_the_other_rows_worse_is_not_kept() -> None:
    mean, deviation, generator = _world(400, 8)
    answers = _answers(mean + deviation, 1.0, generator)
    answers[::2] = torch.randint(4, (200,), generator=generator)
    fit = _checked(mean, deviation, answers)
    assert (fit.posterior_scale, fit.temperature) == (1, 1)
    assert "make the others worse (NLL of the other 200 rows" in fit.summary
    assert max(trial.temperature for trial in fit.trials) > 2


def test_a_gain_that_may_be_chance_is_not_kept() -> None:
    mean, deviation, generator = _world(100, 8)
    fit = _checked(mean, deviation, _answers(mean + deviation, 1.0, generator))
    assert (fit.posterior_scale, fit.temperature) == (1, 1)
    assert "which may be chance" in fit.summary


@pytest.mark.parametrize(("factor", "temperature"), [(60.0, 10.0), (0.02, 0.1)])
def test_a_search_that_ends_at_its_bound_says_so(factor: float, temperature: float) -> None:
    mean, deviation, generator = _world(1_000, 8)
    answers = _answers(mean, 0.3, generator)
    fit = _checked(factor * mean, factor * deviation * 0.01, answers)
    assert fit.temperature == pytest.approx(temperature, rel=0.02)
    assert "the search ended at its bound" in fit.summary


def test_the_prior_pulls_few_rows_to_1_and_hardly_many() -> None:
    mean, _, generator = _world(20_000)
    answers = _answers(mean, 2.0, generator)
    few, many = (fit_scale(lambda _, n=n: mean[:n], answers[:n]).best.temperature for n in (20, 20_000))
    without_prior = fit_scale(lambda _: mean[:20], answers[:20], with_prior=False).best
    assert 1 < few < without_prior.temperature
    assert without_prior.penalised_nll == without_prior.nll
    assert many == pytest.approx(2, rel=0.04)
