"""Calibration recovers what made the data, never makes the fit worse, and keeps its halves apart."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scalabl.errors import CalibrationError
from scalabl.evaluation.calibration import Options, calibrate, fit_scale, minimise, mixture_nll, split_halves
from scalabl.evaluation.encoded import EncodedSet
from scalabl.evaluation.inference import logits_of, predictive_of
from scalabl.uncertainty.absent_choices import without_absent
from scalabl.uncertainty.predictive import predictive
from tests import tiny


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


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(0, 2**31))
def test_halves_are_disjoint_cover_everything_and_share_out_each_answer(answers: list[int], seed: int) -> None:
    labels = torch.tensor(answers)
    first, second = split_halves(labels, seed)
    assert sorted(first.tolist() + second.tolist()) == list(range(len(answers)))
    assert 0 <= len(first) - len(second) <= 1
    for label in set(answers):
        assert abs(int((labels[first] == label).sum()) - int((labels[second] == label).sum())) <= 1


def _labelled(rows: int, *, multiple_choice: bool = False) -> EncodedSet:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, 9, (rows,), generator=generator).tolist()
    counts = torch.randint(2, 5, (rows,), generator=generator) if multiple_choice else torch.full((rows,), 3)
    answers = (torch.rand(rows, generator=generator) * counts).long()
    return EncodedSet(tiny.ragged(lengths), answers, counts)


LOOSE = Options(levels=(0.5, 0.9), target_risk=None)


def test_the_thresholds_come_from_the_other_half_with_the_scale_applied() -> None:
    model, encoded = tiny.adapted(), _labelled(80)
    draws = model.draws(8)
    outcome = calibrate(model, encoded, draws, LOOSE, name="rows", sha256="0")
    found = outcome.calibration
    assert (found.data.fit_rows, found.data.threshold_rows, found.num_samples) == (40, 40, 8)

    # Served as the adapter would be: scale and temperature in the configuration, not in the draws.
    served = tiny.adapted(posterior_scale=outcome.posterior_scale, temperature=outcome.temperature)
    _, held_out = split_halves(encoded.answers, LOOSE.seed)
    logits = logits_of(served, [encoded.sequences[i] for i in held_out.tolist()], draws)
    p = predictive_of(logits, encoded.num_choices[held_out], served, draws)
    truth = p.probabilities.gather(1, encoded.answers[held_out].unsqueeze(1))[:, 0]
    assert found.after.nll == pytest.approx(-float(truth.log().mean()), abs=1e-6)
    assert found.thresholds["lac"]["0.9"] == pytest.approx(float((1 - truth).kthvalue(37).values), abs=1e-6)
    assert found.quantiles["entropy"]["0.5"] == pytest.approx(float(p.entropy.quantile(0.5)), abs=1e-6)
    assert found.abstain is None


def test_random_answers_make_the_adapter_less_sure() -> None:
    model, encoded = tiny.adapted(), _labelled(120)
    found = calibrate(model, encoded, model.draws(8), LOOSE, name="rows", sha256="0").calibration
    assert found.after.nll < found.before.nll
    assert found.after.ece < found.before.ece


def test_calibrating_twice_gives_the_same() -> None:
    model, encoded = tiny.adapted(), _labelled(40)
    first = calibrate(model, encoded, model.draws(4), LOOSE, name="rows", sha256="0")
    assert calibrate(model, encoded, model.draws(4), LOOSE, name="rows", sha256="0") == first
    assert calibrate(model, encoded, model.draws(4), replace(LOOSE, seed=1), name="rows", sha256="0") != first


def test_multiple_choice_never_gives_a_choice_that_an_input_lacks() -> None:
    model, encoded = tiny.adapted(task=tiny.MULTIPLE_CHOICE), _labelled(60, multiple_choice=True)
    outcome = calibrate(model, encoded, model.draws(4), LOOSE, name="rows", sha256="0")
    for level, threshold in outcome.calibration.thresholds["aps"].items():
        assert 0 < threshold <= 1 + 1e-12, level
    logits = without_absent(torch.zeros(60, 1, 4), encoded.num_choices)
    p = predictive(logits, temperature=10.0).probabilities
    assert bool((p.gather(1, (encoded.num_choices - 1).unsqueeze(1)) > 0.2).all())
    assert float(p.sum(-1).min()) == pytest.approx(1)
    assert bool(((p == 0).sum(-1) == 4 - encoded.num_choices).all())


def test_an_abstention_threshold_is_the_guaranteed_one_of_the_best_doubt() -> None:
    model, encoded = tiny.adapted(), _labelled(120)
    options = replace(LOOSE, target_risk=0.95)
    abstain = calibrate(model, encoded, model.draws(4), options, name="rows", sha256="0").calibration.abstain
    assert abstain is not None
    assert (abstain.target_risk, abstain.confidence) == (0.95, 0.9)
    assert abstain.achieved_risk < abstain.risk_bound <= 0.95
    assert abstain.coverage > 0.5


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        (20, Options(), r"level 0\.95 need at least 19 rows for the thresholds and there are 10"),
        (60, replace(LOOSE, target_risk=0.05), "risk of 0.05 with confidence 0.9 needs at least 90 rows .* there are 30"),
        (1, LOOSE, "at least two rows"),
    ],
)
def test_what_the_rows_cannot_give_is_refused(rows: int, options: Options, message: str) -> None:
    model = tiny.adapted()
    with pytest.raises(CalibrationError, match=message):
        calibrate(model, _labelled(rows), model.draws(2), options, name="rows", sha256="0")


def test_a_risk_that_the_answers_do_not_allow_leaves_the_rest_and_says_why() -> None:
    model, encoded = tiny.adapted(), _labelled(200)
    outcome = calibrate(model, encoded, model.draws(2), replace(LOOSE, target_risk=0.05), name="rows", sha256="0")
    assert outcome.calibration.abstain is None
    assert outcome.calibration.thresholds["lac"]
    assert outcome.refusal is not None
    assert outcome.refusal.startswith("no abstention threshold keeps the share of wrong answers within 0.05")
