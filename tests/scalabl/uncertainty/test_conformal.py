"""Prediction sets: scores worked out by hand, and the coverage that theory promises, over many seeds."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from scalabl.config import SetMethod
from scalabl.errors import CalibrationError
from scalabl.uncertainty.conformal import conformal_threshold, prediction_sets, set_scores

METHODS: tuple[SetMethod, ...] = ("lac", "aps")


def test_scores_are_the_textbook_ones() -> None:
    p = torch.tensor([[0.2, 0.5, 0.3], [0.25, 0.25, 0.5]], dtype=torch.float64)
    assert torch.allclose(set_scores(p, "lac"), torch.tensor([[0.8, 0.5, 0.7], [0.75, 0.75, 0.5]], dtype=torch.float64))
    assert torch.allclose(set_scores(p, "aps"), torch.tensor([[1.0, 0.5, 0.8], [0.75, 1.0, 0.5]], dtype=torch.float64))


def test_the_threshold_is_the_order_statistic_with_the_finite_sample_correction() -> None:
    scores = torch.arange(1, 20, dtype=torch.float64)[torch.randperm(19)]  # n = 19
    assert conformal_threshold(scores, 0.9) == 18  # ceil(20 * 0.9)
    assert conformal_threshold(scores, 0.91) == 19
    assert conformal_threshold(scores, 0.95) == 19


def test_too_few_rows_for_a_level_say_how_many_are_needed() -> None:
    with pytest.raises(CalibrationError, match=r"level 0\.95 need at least 19 rows for the thresholds and there are 18"):
        conformal_threshold(torch.zeros(18), 0.95)
    assert conformal_threshold(torch.zeros(19), 0.95) == 0


def _sample(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Overconfident probabilities [N, 5] with answers drawn from softer ones."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, 5, generator=generator, dtype=torch.float64)
    answers = torch.multinomial(torch.softmax(logits / 2, -1), 1, generator=generator)[:, 0]
    return torch.softmax(logits, -1), answers


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("level", [0.8, 0.9, 0.95])
def test_sets_of_a_badly_calibrated_model_cover_as_often_as_promised(method: SetMethod, level: float) -> None:
    rows, repeats = 100, 400
    p, answers = _sample(0, repeats * 2 * rows)
    scores = set_scores(p, method).gather(1, answers.unsqueeze(1)).view(repeats, 2, rows)
    thresholds = torch.tensor([conformal_threshold(each, level) for each in scores[:, 0]])
    covered = (scores[:, 1] <= thresholds.unsqueeze(1)).double().mean(1)  # of each repeat's unseen half
    mean, error = covered.mean().item(), covered.std().item() / math.sqrt(repeats)
    assert level - 4 * error <= mean <= level + 1 / (rows + 1) + 4 * error


@given(st.integers(0, 2**31), st.sampled_from(METHODS), st.floats(0, 1))
def test_a_set_holds_the_most_probable_choices_and_never_nothing(seed: int, method: SetMethod, threshold: float) -> None:
    p, _ = _sample(seed, 20)
    sets = prediction_sets(p, method, threshold)
    assert bool(sets.gather(1, p.argmax(-1, keepdim=True)).all())
    least_inside = p.masked_fill(~sets, math.inf).min(-1).values
    most_outside = p.masked_fill(sets, -math.inf).max(-1).values
    assert bool((least_inside >= most_outside).all())
    wider = prediction_sets(p, method, threshold + 0.1)
    assert bool((wider | ~sets).all()), "a larger threshold keeps every choice of a smaller one"


def test_without_keep_top_a_sure_answer_can_leave_the_set_empty() -> None:
    p = torch.tensor([0.5, 0.3, 0.2])
    assert not prediction_sets(p, "lac", 0.4, keep_top=False).any()
    assert prediction_sets(p, "lac", 0.4).tolist() == [True, False, False]
