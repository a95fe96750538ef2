"""Every score against torchmetrics or a definition worked out by hand; weights count as repeated inputs."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from scalabl.evaluation.scoring import (
    adaptive_calibration_error,
    auroc,
    bins_of,
    calibration_error,
    classwise_calibration_error,
    interval,
    labelled_scores,
    outside_scores,
    passing_rate,
    resamples,
    scores,
)
from scalabl.uncertainty.predictive import Predictive, predictive
from scalabl.uncertainty.selective import aurc, doubts

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torchmetrics.functional.classification import binary_auroc, multiclass_calibration_error


def _predictions(count: int, seed: int = 0, choices: int = 4) -> tuple[Predictive, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 1.5 * torch.randn(count, 1, choices, generator=generator) + torch.randn(count, 5, choices, generator=generator)
    answers = torch.where(
        torch.rand(count, generator=generator) < 0.6,
        logits.mean(1).argmax(-1),
        torch.randint(choices, (count,), generator=generator),
    )
    return predictive(logits), answers


def _taken(outcome: Predictive, index: Tensor) -> Predictive:
    taken = {name: getattr(outcome, name)[index] for name in ("probabilities", "entropy", "mutual_information")}
    return replace(outcome, **taken)


ONE = torch.ones(1, 300, dtype=torch.float64)


def test_equal_width_calibration_error_is_torchmetrics() -> None:
    outcome, answers = _predictions(300)
    confidence, index = outcome.probabilities.max(-1)
    expected = multiclass_calibration_error(outcome.probabilities.float(), answers, num_classes=4, n_bins=15, norm="l1")
    assert float(calibration_error(ONE, confidence, index == answers)) == pytest.approx(float(expected), abs=1e-6)


def test_a_probability_of_one_shares_the_last_bin_and_bins_are_closed_above() -> None:
    assert bins_of(torch.tensor([0.0, 1 / 15, 0.07, 14 / 15, 0.999, 1.0], dtype=torch.float64)).tolist() == [
        0,
        0,
        1,
        13,
        14,
        14,
    ]
    confidence = torch.tensor([1.0, 0.95, 0.95], dtype=torch.float64)
    error = calibration_error(ONE[:, :3], confidence, torch.tensor([False, True, True]))
    assert float(error) == pytest.approx(abs(2.9 - 2) / 3)


def test_adaptive_calibration_error_has_bins_of_equally_many() -> None:
    outcome, answers = _predictions(300)
    confidence, index = outcome.probabilities.max(-1)
    hit = (index == answers).double()
    order = np.argsort(confidence.numpy(), kind="stable")
    parts = [torch.from_numpy(part) for part in np.array_split(order, 15)]  # 300 = 15 * 20
    expected = sum(abs(float((confidence[part] - hit[part]).sum())) for part in parts) / 300
    assert float(adaptive_calibration_error(ONE, confidence, index == answers)) == pytest.approx(expected)


def test_classwise_calibration_error_is_the_mean_of_each_choice_against_the_rest() -> None:
    outcome, answers = _predictions(300)
    p = outcome.probabilities
    each = [float(calibration_error(ONE, p[:, c], answers == c)) for c in range(4)]
    assert float(classwise_calibration_error(ONE, p, answers)) == pytest.approx(sum(each) / 4)


@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=40))
def test_auroc_is_torchmetrics_ties_included_and_not_a_number_without_both_kinds(pairs: list[tuple[int, bool]]) -> None:
    score, positive = torch.tensor([s for s, _ in pairs]), torch.tensor([p for _, p in pairs])
    found = float(auroc(ONE[:, : len(pairs)], score, positive))
    if 0 < int(positive.sum()) < len(pairs):
        assert found == pytest.approx(float(binary_auroc(score / 5, positive.int())), abs=1e-6)
    else:
        assert math.isnan(found)


def test_areas_under_the_risk_coverage_curve_are_those_of_the_curve() -> None:
    outcome, answers = _predictions(300)
    wrong = outcome.probabilities.argmax(-1) != answers
    found = labelled_scores(outcome, answers)
    for name, doubt in doubts(outcome).items():
        assert float(found[f"aurc_{name}"]) == pytest.approx(aurc(doubt, wrong))


@given(st.integers(0, 2**31))
def test_weights_count_as_repeated_inputs(seed: int) -> None:
    outcome, answers = _predictions(45, seed)
    weights = next(resamples(45, 1, seed, 1))
    index = torch.arange(45).repeat_interleave(weights[0].long())
    weighted = labelled_scores(outcome, answers, weights)
    repeated = labelled_scores(_taken(outcome, index), answers[index])
    for name, value in repeated.items():
        if name != "ece_adaptive":  # whose bins may cut a repeated input in two
            assert float(weighted[name]) == pytest.approx(float(value), nan_ok=True, abs=1e-9), name
    inner = outside_scores(outcome, _taken(outcome, index), weights)
    assert float(inner["auroc_ood_entropy"]) == pytest.approx(0.5), "a set against itself"


def test_many_weightings_give_what_each_gives_alone() -> None:
    outcome, answers = _predictions(120)
    weights = next(resamples(120, 7, 0, 7))
    together = labelled_scores(outcome, answers, weights)
    for row in range(7):
        alone = labelled_scores(outcome, answers, weights[row : row + 1])
        for name, value in alone.items():
            assert float(together[name][row]) == pytest.approx(float(value), nan_ok=True), name


@pytest.mark.parametrize("block", [1, 4, 10, 100])
def test_resamples_are_seeded_keep_the_count_and_come_in_blocks(block: int) -> None:
    blocks = list(resamples(30, 10, 5, block))
    weights = torch.cat(blocks)
    assert max(map(len, blocks)) <= block
    assert weights.shape == (10, 30)
    assert bool((weights.sum(1) == 30).all())
    assert torch.equal(weights, torch.cat(list(resamples(30, 10, 5, block))))


def test_intervals_hold_the_true_value_about_as_often_as_they_say() -> None:
    names = ("accuracy", "nll", "auroc_wrong_entropy", "aurc_entropy")
    truth = labelled_scores(*_predictions(60_000, 10**6))
    inside = dict.fromkeys(names, 0)
    for seed in range(120):
        outcome, answers = _predictions(150, seed)
        found = labelled_scores(outcome, answers)
        resampled = labelled_scores(outcome, answers, next(resamples(150, 200, seed, 200)))
        for name in names:
            low, high = interval(float(found[name]), resampled[name])
            inside[name] += low <= float(truth[name]) <= high
    assert all(0.88 <= count / 120 <= 0.99 for count in inside.values()), inside


def test_an_interval_of_a_calibration_error_holds_its_value_though_resampling_makes_it_larger() -> None:
    outcome, answers = _predictions(200)
    value = float(labelled_scores(outcome, answers)["ece"])
    resampled = torch.cat([labelled_scores(outcome, answers, w)["ece"] for w in resamples(200, 300, 0, 100)])
    assert float(resampled.mean()) > value
    low, high = interval(value, resampled)
    assert 0 <= low < value < high


def test_scores_are_the_textbook_ones() -> None:
    p = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.1, 0.9], [0.3, 0.7]], dtype=torch.float64)
    result = scores(predictive(p.log().unsqueeze(1)), torch.tensor([0, 1, 1, 1]))
    assert result["accuracy"] == 0.75
    assert result["nll"] == pytest.approx(-(math.log(0.8) + math.log(0.4) + math.log(0.9) + math.log(0.7)) / 4)
    assert result["brier"] == pytest.approx((2 * 0.04 + 2 * 0.36 + 2 * 0.01 + 2 * 0.09) / 4)
    # Every confidence falls into a bin of its own: |0.8 - 1|, |0.6 - 0|, |0.9 - 1|, |0.7 - 1|, a quarter each.
    assert result["ece"] == pytest.approx((0.2 + 0.6 + 0.1 + 0.3) / 4, abs=1e-6)
    assert result["auroc_wrong_confidence"] == 1.0, "the wrong answer is the least confident one"
    assert result["mutual_information"] == 0


def test_auroc_is_left_out_when_nothing_is_wrong() -> None:
    outcome = predictive(torch.tensor([[[2.0, 0.0]], [[0.0, 2.0]]]))
    assert "auroc_wrong_entropy" not in scores(outcome, torch.tensor([0, 1]))


def test_auroc_counts_pairs_and_ties_as_half() -> None:
    sure, split, even = [[9.0, 0.0]], [[1.0, 0.0]], [[0.0, 0.0]]
    inside = predictive(torch.tensor([sure, split]))
    outside = predictive(torch.tensor([split, even]))
    # pairs (inside, outside): sure < split, sure < even, split = split (half), split < even
    assert float(outside_scores(inside, outside)["auroc_ood_entropy"]) == pytest.approx(3.5 / 4)


def test_auroc_tells_scores_apart_that_a_sigmoid_would_tie() -> None:
    inside = predictive(torch.tensor([[[40.0, 0.0]], [[41.0, 0.0]]]).double())
    outside = predictive(torch.tensor([[[38.0, 0.0]], [[39.0, 0.0]]]).double())
    assert float(outside_scores(inside, outside)["auroc_ood_entropy"]) == 1.0


def test_the_passing_rate_is_the_share_outside_below_the_quantile_inside() -> None:
    generator = torch.Generator().manual_seed(0)
    inside, outside = torch.rand(200, generator=generator), torch.rand(50, generator=generator) + 0.5
    ones = torch.ones(1, 200, dtype=torch.float64), torch.ones(1, 50, dtype=torch.float64)
    threshold = inside.sort().values[189]  # 190 of 200 inputs pass
    expected = float((outside <= threshold).double().mean())
    assert float(passing_rate(ones[0], inside, ones[1], outside)) == pytest.approx(expected)
    # Weights count as repeated inputs.
    inner, outer = (torch.randint(0, 3, (1, n), generator=generator).double() for n in (200, 50))
    repeated = inside.repeat_interleave(inner[0].long()), outside.repeat_interleave(outer[0].long())
    again = passing_rate(
        torch.ones(1, len(repeated[0]), dtype=torch.float64), repeated[0],
        torch.ones(1, len(repeated[1]), dtype=torch.float64), repeated[1],
    )  # fmt: skip
    assert float(passing_rate(inner, inside, outer, outside)) == pytest.approx(float(again))
