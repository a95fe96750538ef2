"""The test martingale: uniform online p-values, no false alarm for long, a change found soon, and bounded memory."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from scalabl.uncertainty.drift import BINS, DriftMartingale, _log_bets

Scores = NDArray[np.float64]


def like(count: int, generator: np.random.Generator) -> Scores:
    """Scores of inputs like the calibration rows."""
    return np.clip(generator.normal(-0.6, 0.12, count), -1, 1)


def strange(count: int, generator: np.random.Generator) -> Scores:
    """Scores of other inputs, which overlap with those."""
    return np.clip(generator.normal(-0.35, 0.1, count), -1, 1)


def highest(martingale: DriftMartingale, scores: Scores) -> float:
    """The highest value while the martingale sees these scores, as a decimal logarithm."""
    top = -math.inf
    for score in scores:
        martingale.see(float(score))
        top = max(top, martingale.log10)
    return top


def test_each_bet_is_fair() -> None:
    u = (np.arange(5000) + 0.5) / 5000
    weight = 5 * u**4  # of dp for p = u^5, which has more points near 0, where some bets are unbounded
    low, high = (np.exp([_log_bets(float(value)) for value in p]) for p in (u**5, 1 - u**5))
    gains = np.concatenate([weight @ low[:, :4], weight @ high[:, 4:]]) / 5000
    assert np.allclose(gains, 1, atol=1e-3)


def test_p_values_are_uniform_as_long_as_nothing_changes() -> None:
    generator = np.random.default_rng(0)
    martingale = DriftMartingale(like(100, generator))
    p = np.sort([martingale.see(float(score)) for score in like(4000, generator)])
    distance = np.abs(p - np.arange(1, 4001) / 4000).max()
    assert distance < 1.63 / math.sqrt(4000), "Kolmogorov and Smirnov's test at 1%"
    assert p[0] > 0
    assert p[-1] <= 1


def test_equal_scores_are_no_evidence() -> None:
    martingale = DriftMartingale([0.25] * 50)
    assert highest(martingale, np.full(2000, 0.25)) < 2


def test_without_a_change_it_hardly_ever_exceeds_100() -> None:
    above = 0
    for seed in range(40):
        generator = np.random.default_rng(seed)
        above += highest(DriftMartingale(like(500, generator), seed), like(3000, generator)) > 2
    assert above <= 2


@pytest.mark.parametrize("before", [0, 2000, 20_000])
def test_a_fifth_of_strange_inputs_is_found_within_500(before: int) -> None:
    for seed in range(5):
        generator = np.random.default_rng(seed)
        martingale = DriftMartingale(like(500, generator), seed)
        assert highest(martingale, like(before, generator)) < 2
        mixed = np.where(generator.random(500) < 0.2, strange(500, generator), like(500, generator))
        assert highest(martingale, mixed) > 2


def test_inputs_that_are_more_alike_than_before_are_a_change_too() -> None:
    generator = np.random.default_rng(0)
    martingale = DriftMartingale(like(500, generator))
    assert highest(martingale, np.full(500, -0.95)) > 2


def test_the_same_inputs_give_the_same_values() -> None:
    runs = []
    for _ in range(2):
        generator = np.random.default_rng(5)
        martingale = DriftMartingale(like(50, generator))
        runs.append([martingale.see(float(score)) for score in like(50, generator)])
    assert runs[0] == runs[1]


def test_a_change_that_lasts_is_remembered_by_the_highest_value() -> None:
    generator = np.random.default_rng(0)
    martingale = DriftMartingale(like(500, generator))
    top = highest(martingale, strange(6000, generator))
    assert martingale.highest_log10 == top > 2
    assert martingale.log10 < top


def test_it_counts_and_begins_at_1() -> None:
    martingale = DriftMartingale([-0.5])
    assert (martingale.log10, martingale.inputs) == (0, 0)
    martingale.see(2.0)  # rounding may leave the range of a cosine
    martingale.see(-2.0)
    assert martingale.inputs == 2


def test_memory_does_not_grow() -> None:
    martingale = DriftMartingale([])
    for score in np.linspace(-1, 1, 500):
        martingale.see(float(score))
    arrays = [value for value in vars(martingale).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in arrays) <= 8 * (BINS + 8)
