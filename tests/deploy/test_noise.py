"""The noise floor of the calibration alert: it rarely fires for calibrated models, and does for over-confident ones."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

BINS = 15
WINDOWS = 1000

Dice = np.random.Generator
SHAPES: dict[str, Callable[[Dice, int], np.ndarray]] = {
    "every confidence": lambda dice, count: dice.uniform(0.1, 1, count),
    "mostly sure": lambda dice, count: dice.beta(20, 1, count),
    "nearly always sure": lambda dice, count: 1 - 0.5 * dice.uniform(0, 1, count) ** 6,
    "rarely sure": lambda dice, count: dice.beta(5, 5, count),
}


def _numbers(confidence: np.ndarray, correct: np.ndarray) -> tuple[float, float, float]:
    """ECE, its floor and its deviation, as the recording rules of deploy/prometheus/rules/outcomes.yml have them."""
    which = np.minimum((confidence * BINS).astype(int), BINS - 1)
    labels, summed, right = (
        np.bincount(which, weights, BINS) for weights in (np.ones_like(confidence), confidence, correct)
    )
    mean = summed / np.maximum(labels, 1)
    variance = np.maximum(labels * mean * (1 - mean), 0)
    count = labels.sum()
    floor = math.sqrt(2 / math.pi) * np.sqrt(variance).sum() / count
    return np.abs(right - summed).sum() / count, floor, math.sqrt((1 - 2 / math.pi) * variance.sum()) / count


def _windows(shape: str, count: int, distort: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """[WINDOWS, 3]: the numbers of windows of labels; `distort` turns true probabilities into the reported confidence."""
    dice = np.random.default_rng(0)
    numbers = []
    for _ in range(WINDOWS):
        truth = SHAPES[shape](dice, count)
        numbers.append(_numbers(distort(truth), (dice.uniform(size=count) < truth).astype(float)))
    return np.array(numbers)


def _alerts(windows: np.ndarray) -> float:
    ece, floor, deviation = windows.T
    return float(((ece > 0.05) & (ece > floor + 4 * deviation)).mean())


@pytest.mark.parametrize("count", [100, 1000])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_floor_is_the_ece_of_a_calibrated_model_and_hardly_any_is_accused(shape: str, count: int) -> None:
    windows = _windows(shape, count, lambda truth: truth)
    ece, floor, deviation = windows.mean(0)
    assert floor == pytest.approx(ece, rel=0.06)
    assert deviation == pytest.approx(windows[:, 0].std(), rel=0.12)
    assert _alerts(windows) <= 0.004


@pytest.mark.parametrize(("count", "share"), [(100, 0.15), (300, 0.85), (1000, 0.999)])
def test_a_model_that_is_too_sure_is_accused_the_more_surely_the_more_labels_there_are(count: int, share: float) -> None:
    assert _alerts(_windows("every confidence", count, lambda truth: truth + 0.8 * (1 - truth) * truth)) >= share
