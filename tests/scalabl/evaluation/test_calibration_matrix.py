"""No calibration of few or easy rows makes an adapter worse on other inputs of its kind: a matrix of simulated data sets.

The truth is known: inputs have logits mean + tau * deviation for K samples, and answers follow the predictive at a scale
tau* and temperature T* that the fit does not know. What is saved is scored on fresh inputs by its exact expected NLL.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

from scalabl.evaluation.calibration import split_halves
from scalabl.evaluation.calibration_fit import CheckedFit, checked_fit

SAMPLES, FRESH, WRONG = 8, 600, 0.2
TRUTHS = ((1.0, 1.0), (1.0, 0.6), (1.0, 2.0), (0.4, 1.0), (2.0, 1.5))  # tau*, T*
SEEDS = 10


@dataclass(frozen=True)
class Inputs:
    """Mean logits [N, 1, C] and deviations [N, K, C] of inputs whose answers follow a known predictive."""

    mean: Tensor
    deviation: Tensor

    def logits(self, scale: float) -> Tensor:
        return self.mean + scale * self.deviation

    def probabilities(self, scale: float, temperature: float) -> Tensor:
        return torch.softmax(self.logits(scale).double() / temperature, -1).mean(1)

    def __getitem__(self, rows: Tensor) -> Inputs:
        return Inputs(self.mean[rows], self.deviation[rows])


def _inputs(count: int, classes: int, strength: float, generator: torch.Generator) -> Inputs:
    mean = strength * torch.randn(count, 1, classes, generator=generator)
    spread = 2 * torch.rand(count, 1, 1, generator=generator)
    return Inputs(mean, spread * torch.randn(count, SAMPLES, classes, generator=generator))


@cache
def _strength(classes: int, truth: tuple[float, float]) -> float:
    """How large the mean logits must be for the share of wrong answers to be `WRONG`."""
    low, high = 0.1, 60.0
    for _ in range(12):
        middle = (low + high) / 2
        inputs = _inputs(300, classes, middle, torch.Generator().manual_seed(0))
        prediction = inputs.probabilities(1, 1).argmax(-1, keepdim=True)
        right = float(inputs.probabilities(*truth).gather(-1, prediction).mean())
        low, high = (middle, high) if right < 1 - WRONG else (low, middle)
    return (low + high) / 2


def _labelled(
    rows: int, wrong: int, classes: int, truth: tuple[float, float], generator: torch.Generator
) -> tuple[Inputs, Tensor]:
    """Rows of which exactly `wrong` are answered wrong at scale and temperature 1, and their answers."""
    inputs = _inputs(10 * rows, classes, _strength(classes, truth), generator)
    answers = torch.multinomial(inputs.probabilities(*truth), 1, generator=generator)[:, 0]
    mistaken = inputs.probabilities(1, 1).argmax(-1) != answers
    chosen = torch.cat([mistaken.nonzero()[:wrong, 0], (~mistaken).nonzero()[: rows - wrong, 0]])
    assert len(chosen) == rows
    return inputs[chosen], answers[chosen]


def _fit(inputs: Inputs, answers: Tensor, seed: int) -> CheckedFit:
    fit, other = split_halves(answers, seed)
    return checked_fit(inputs[fit].logits, answers[fit], inputs[other].logits, answers[other])


def _excess(fit: CheckedFit, classes: int, truth: tuple[float, float], generator: torch.Generator) -> float:
    """How much higher than without the fit the expected NLL of fresh inputs is."""
    fresh = _inputs(FRESH, classes, _strength(classes, truth), generator)
    answer_probabilities = fresh.probabilities(*truth)
    with_fit, without = (
        -(answer_probabilities * fresh.probabilities(*values).log().clamp_min(-700)).sum(-1).mean()
        for values in ((fit.posterior_scale, fit.temperature), (1.0, 1.0))
    )
    return float(with_fit - without)


@pytest.mark.parametrize("classes", [2, 10, 150])
@pytest.mark.parametrize("wrong", ["none", "one", "a fifth"])
@pytest.mark.parametrize("rows", [10, 50, 200])
def test_what_is_saved_is_never_worse_and_no_bound_is_taken_silently(rows: int, wrong: str, classes: int) -> None:
    errors = {"none": 0, "one": 1, "a fifth": rows // 5}[wrong]
    for seed in range(SEEDS):
        truth = TRUTHS[seed % len(TRUTHS)]
        generator = torch.Generator().manual_seed(seed)
        fit = _fit(*_labelled(rows, errors, classes, truth, generator), seed)
        if (fit.posterior_scale, fit.temperature) == (1, 1):
            assert "stay 1: " in fit.summary
        else:
            assert _excess(fit, classes, truth, generator) <= 0.01, (truth, seed, fit.summary)
        if fit.temperature in (0.1, 10.0) or fit.posterior_scale in (0.25, 4.0):
            assert "the search ended at its bound" in fit.summary


@pytest.mark.parametrize("classes", [2, 10, 150])
def test_a_strong_miscalibration_is_still_mended_by_200_rows(classes: int) -> None:
    truth, mended = (1.0, 2.5), 0.0
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        fit = _fit(*_labelled(200, 40, classes, truth, generator), seed)
        mended += (_excess(fit, classes, truth, generator) < -0.02) / SEEDS
    assert mended >= 0.7
