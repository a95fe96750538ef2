"""What an evaluation reports agrees with its scores, and what it says of sets and abstention with the calibration."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from scalabl.config import Abstention, Calibration, CalibrationData, Fit
from scalabl.evaluation.plots import save_evaluation
from scalabl.evaluation.report import Evaluated, reliability, report
from scalabl.evaluation.scoring import scores
from scalabl.uncertainty.predictive import predictive


def _evaluated(count: int, seed: int, labelled: bool = True) -> Evaluated:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(count, 1, 3, generator=generator) + torch.randn(count, 6, 3, generator=generator)
    outcome = predictive(logits)
    answers = torch.multinomial(outcome.probabilities, 1, generator=generator)[:, 0]
    if not labelled:
        answers = torch.full((count,), -1)
    return Evaluated(f"set{seed}", outcome, answers, torch.full((count,), 3), tokens=7 * count, seconds=count / 4)


CALIBRATION = Calibration(
    data=CalibrationData(name="v", sha256="0", rows=2, fit_rows=1, threshold_rows=1),
    num_samples=6,
    seed=0,
    draw_scheme="sobol",
    method="lac",
    thresholds={"lac": {"0.5": 0.05, "0.9": 0.8}, "aps": {"0.5": 0.5, "0.9": 0.9}},
    abstain=Abstention(
        score="entropy", threshold=0.4, target_risk=0.1, confidence=0.9, achieved_risk=0.05, risk_bound=0.09, coverage=0.5
    ),
    quantiles={"mutual_information": {}, "entropy": {}},
    before=Fit(nll=1, ece=0.1),
    after=Fit(nll=0.9, ece=0.05),
)


def test_a_report_is_json_with_an_interval_around_each_score() -> None:
    inside, outside = _evaluated(120, 0), _evaluated(60, 1, labelled=False)
    found = json.loads(json.dumps(report(inside, [outside], None, repeats=100)))
    data, (other,) = found["data"], found["ood"]
    assert {name: data[name] for name in scores(inside.outcome, inside.answers)} == scores(inside.outcome, inside.answers)
    for each in (data, other):
        assert each["intervals"]
        for name, (low, high) in each["intervals"].items():
            assert low <= each[name] <= high, name
    assert data["cost"] == {"seconds_per_input": 0.25, "tokens_per_input": 7.0}
    assert (data["inputs"], other["inputs"]) == (120, 60)
    assert "prediction_sets" not in data


def test_a_report_is_the_same_every_time_and_can_leave_the_intervals_out() -> None:
    inside = _evaluated(80, 0)
    assert report(inside, [], None, repeats=50) == report(inside, [], None, repeats=50)
    assert "intervals" not in report(inside, [], None, repeats=0)["data"]


def test_when_nothing_is_wrong_the_score_of_wrong_answers_is_left_out() -> None:
    outcome = predictive(torch.tensor([[[9.0, 0.0]], [[0.0, 9.0]]]))
    right = Evaluated("sure", outcome, torch.tensor([0, 1]), torch.tensor([2, 2]), 4, 1.0)
    data = report(right, [], None, repeats=20)["data"]
    assert "auroc_wrong_entropy" not in data
    assert "auroc_wrong_entropy" not in data["intervals"]
    assert data["accuracy"] == 1


def test_the_reliability_bins_add_up_to_the_accuracy_and_the_calibration_error() -> None:
    inside = _evaluated(200, 2)
    bins, found = reliability(inside.outcome, inside.answers), scores(inside.outcome, inside.answers)
    assert sum(each["count"] for each in bins) == 200
    assert sum(each["count"] * each["accuracy"] for each in bins) / 200 == pytest.approx(found["accuracy"])
    gaps = sum(each["count"] * abs(each["accuracy"] - each["confidence"]) for each in bins) / 200
    assert gaps == pytest.approx(found["ece"])
    assert all(each["low"] <= each["confidence"] <= each["high"] for each in bins)


def test_the_risk_of_answering_everything_is_the_error_rate() -> None:
    inside = _evaluated(200, 3)
    data = report(inside, [], None, repeats=0)["data"]
    for curve in data["risk_coverage"].values():
        assert curve["1"] == pytest.approx(1 - data["accuracy"])
        assert curve["0.2"] < curve["1"]


def test_sets_and_abstention_are_those_of_the_calibration() -> None:
    inside, outside = _evaluated(150, 4), _evaluated(50, 5, labelled=False)
    found = report(inside, [outside], CALIBRATION, repeats=0)
    small, large = found["data"]["prediction_sets"]
    p, truth = inside.outcome.probabilities, inside.answers.unsqueeze(1)
    rule = (1 - p <= 0.05).gather(1, truth).double().mean()
    assert small["coverage_of_rule"] == pytest.approx(float(rule))
    assert small["coverage"] >= found["data"]["accuracy"] > small["coverage_of_rule"]
    assert (
        1
        <= small["mean_size"]
        <= large["mean_size"]
        == pytest.approx(float((1 - p <= 0.8).sum(1).clamp_min(1).double().mean()))
    )
    answered = inside.outcome.entropy <= 0.4
    abstention = found["data"]["abstention"]
    assert abstention["answered"] == pytest.approx(float(answered.double().mean()))
    wrong = p.argmax(-1) != inside.answers
    assert abstention["risk"] == pytest.approx(float(wrong[answered].double().mean()))
    other = found["ood"][0]
    assert "coverage" not in other["prediction_sets"][0]
    assert "risk" not in other["abstention"]


def test_sets_never_count_a_choice_that_an_input_lacks() -> None:
    logits = torch.tensor([[[0.0, 0.0, -1e6]], [[0.0, 0.0, 0.0]]])
    each = Evaluated("letters", predictive(logits), torch.tensor([0, 2]), torch.tensor([2, 3]), 4, 1.0)
    everything = CALIBRATION.model_copy(update={"thresholds": {"lac": {"0.9": 1.0}}, "abstain": None})
    (sets,) = report(each, [], everything, repeats=0)["data"]["prediction_sets"]
    assert (sets["mean_size"], sets["coverage"]) == (2.5, 1.0)


def test_the_plots_are_drawn(tmp_path: Path) -> None:
    save_evaluation(_evaluated(60, 6), [_evaluated(30, 7, labelled=False)], tmp_path / "new" / "plots")
    names = sorted(path.name for path in (tmp_path / "new" / "plots").iterdir())
    assert names == ["mutual_information.png", "reliability.png", "risk_coverage.png"]
    assert all((tmp_path / "new" / "plots" / name).read_bytes().startswith(b"\x89PNG") for name in names)
