"""Calibration keeps its halves apart, gives thresholds that hold, and says what it did. The fit has a test of its own."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from scalabl.errors import CalibrationError
from scalabl.evaluation import calibration
from scalabl.evaluation.calibration import Options, calibrate, split_halves
from scalabl.evaluation.encoded import EncodedSet
from scalabl.evaluation.inference import logits_of, predictive_of
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.uncertainty.absent_choices import without_absent
from scalabl.uncertainty.predictive import predictive
from tests import tiny


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
        (19, LOOSE, "calibration needs at least 20 rows, and there are 19"),
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


def _certain(model: ScalaBLModel, answers: Tensor, *, right: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every prediction certain, and right or wrong."""
    logits = torch.zeros(len(answers), 2, model.num_choices)
    logits[torch.arange(len(answers)), :, answers if right else (answers + 1) % 3] = 2000.0
    lookup = dict(zip(map(tuple, _labelled(len(answers)).sequences), logits, strict=True))
    monkeypatch.setattr(
        calibration, "logits_of", lambda _, sequences, *args, **kwargs: torch.stack([lookup[tuple(s)] for s in sequences])
    )


@pytest.mark.parametrize(
    ("right", "threshold", "said"),
    [(True, 0, "prediction sets hold only the most probable choice"), (False, 1, "prediction sets hold every choice")],
)
def test_a_threshold_at_the_end_of_its_range_is_said(
    right: bool, threshold: float, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, encoded = tiny.adapted(), _labelled(60)
    _certain(model, encoded.answers, right=right, monkeypatch=monkeypatch)
    outcome = calibrate(model, encoded, model.draws(2), replace(LOOSE, target_risk=0.9), name="rows", sha256="0")
    assert outcome.calibration.thresholds["lac"]["0.9"] == threshold
    assert any(note.startswith("at level 0.9 ") and said in note for note in outcome.notes)
    assert any("the abstention threshold is 0" in note for note in outcome.notes) is right
