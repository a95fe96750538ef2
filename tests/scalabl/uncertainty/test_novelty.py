"""Novelty: coordinates, scores and p-values against second derivations, and the guarantee."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from scalabl.uncertainty.novelty import (
    COMPONENTS,
    RIDGE,
    covering_rows,
    fit_reference,
    p_values,
    rows_for_level,
)

CLASSES = torch.arange(300) % 3
PROBE = torch.ones(12)


def states(count: int = 300, width: int = 12, seed: int = 0, shift: float = 0.0) -> Tensor:
    """Rows of three classes with different means, whose directions have different spreads."""
    generator = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(3, width, generator=torch.Generator().manual_seed(99))
    noise = torch.randn(count, width, generator=generator) * torch.linspace(0.2, 2, width)
    return centres[torch.arange(count) % 3] + noise + shift


def test_coordinates_are_whitened_within_classes() -> None:
    x = states()
    reference = fit_reference(x, CLASSES, PROBE)
    mapped = ((x - x.mean(0)) @ reference.projection.T).double()
    within = mapped - torch.stack([mapped[c == CLASSES].mean(0) for c in range(3)])[CLASSES]
    covariance = within.T @ within / len(x)
    covariance /= covariance.diagonal().mean()
    # The ridge of 1% keeps the directions of least spread below the others.
    assert (covariance - torch.eye(12)).abs().max() < 0.35
    assert covariance.diagonal().min() > 1 / (1 + 4 * RIDGE * 12) / 2


def test_scores_are_the_mean_cosine_to_the_nearest_rows() -> None:
    reference = fit_reference(states(), CLASSES, PROBE)
    new = states(7, seed=1, shift=0.5)
    for state, score in zip(new, reference.scores(new), strict=True):
        mapped = reference.projection.double() @ (state - reference.mean).double()
        cosines = sorted(float(mapped @ row.double() / mapped.norm() / row.double().norm()) for row in reference.rows)
        assert -float(score) == pytest.approx(sum(cosines[-5:]) / 5, abs=1e-3)


def test_a_score_does_not_depend_on_the_other_inputs() -> None:
    reference = fit_reference(states(), CLASSES, PROBE)
    new = states(50, seed=1)
    alone = torch.cat([reference.scores(state.unsqueeze(0)) for state in new])
    torch.testing.assert_close(reference.scores(new), alone, rtol=0, atol=1e-6)


def test_p_values_count_the_calibration_scores_that_are_as_high() -> None:
    calibration = torch.tensor([0.1, 0.2, 0.2, 0.4], dtype=torch.float64)
    scores = torch.tensor([0.0, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5], dtype=torch.float64)
    brute = [(1 + sum(c >= s for c in calibration.tolist())) / 5 for s in scores.tolist()]
    assert p_values(calibration, scores).tolist() == pytest.approx(brute)


def test_of_inputs_like_the_calibration_rows_at_most_alpha_are_novel() -> None:
    novel = {0.01: 0, 0.05: 0, 0.2: 0}
    for seed in range(200):
        draws = torch.rand(100, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        p = p_values(draws[:99].sort().values, draws[99:])
        for alpha in novel:
            novel[alpha] += int(p <= alpha)
    for alpha, count in novel.items():
        assert abs(count / 200 - alpha) <= 3 * math.sqrt(alpha * (1 - alpha) / 200), alpha


def test_strange_inputs_have_small_p_values() -> None:
    reference = fit_reference(states(), CLASSES, PROBE)
    reference = reference.calibrated(reference.scores(states(200, seed=1)))
    like, strange = (reference.p_values(reference.scores(x)) for x in (states(200, seed=2), -4 * states(200, seed=3)))
    assert like is not None
    assert strange is not None
    assert float((like <= 0.05).double().mean()) < 0.12
    assert float((strange <= 0.05).double().mean()) > 0.9


def test_a_large_set_is_thinned_in_proportion_and_keeps_every_class() -> None:
    classes = torch.tensor([0] * 900 + [1] * 97 + [2] * 3)
    chosen = covering_rows(classes, 100, seed=1)
    assert len(chosen) == 100
    assert chosen.unique().tolist() == chosen.tolist()
    assert [int((classes[chosen] == c).sum()) for c in range(3)] == [90, 9, 1]
    assert torch.equal(covering_rows(classes, 100, seed=1), chosen)
    assert not torch.equal(covering_rows(classes, 100, seed=2), chosen)
    assert torch.equal(covering_rows(classes, 1000), torch.arange(1000))


def test_more_classes_than_rows_is_no_obstacle() -> None:
    assert len(covering_rows(torch.arange(50), 10)) == 10


@pytest.mark.parametrize(
    "classes", [torch.zeros(40, dtype=torch.int64), torch.arange(40)], ids=["one class", "one row each"]
)
def test_any_division_into_classes_gives_a_reference(classes: Tensor) -> None:
    reference = fit_reference(states(40), classes, PROBE)
    assert torch.isfinite(reference.projection).all()
    torch.testing.assert_close(reference.rows.norm(dim=-1), torch.ones(40), rtol=0, atol=2e-3)


def test_fewer_rows_than_dimensions_give_fewer_components() -> None:
    reference = fit_reference(states(5, width=400), CLASSES[:5], torch.ones(400))
    assert len(reference.projection) == 4
    assert len(fit_reference(states(900, width=400), torch.arange(900) % 3, torch.ones(400)).projection) == COMPONENTS


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.zeros(1, 4), "at least two rows"),
        (torch.full((3, 4), torch.nan), "not finite"),
        (torch.ones(3, 4), "all equal"),
    ],
)
def test_rows_that_give_no_reference_are_refused(rows: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_reference(rows, torch.zeros(len(rows)), torch.ones(4))


@pytest.mark.parametrize("level", [0.05, 0.1, 0.3])
def test_rows_for_a_level(level: float) -> None:
    rows = rows_for_level(level)
    assert 1 / (1 + rows) <= level + 1e-9 < 1 / rows + 1e-6
