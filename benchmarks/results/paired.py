"""Differences of two methods' NLL and ECE on the same queries, with the interval of a paired bootstrap."""

from __future__ import annotations

import torch
from torch import Tensor

from scalabl.evaluation.scoring import calibration_error, resamples, weighted_mean
from scalabl.uncertainty.predictive import Predictive

REPEATS = 10_000


def paired_differences(pairs: list[tuple[Predictive, Predictive]], answers: Tensor) -> dict[str, dict[str, float]]:
    """Mean over the pairs of the second's NLL and ECE minus the first's, with the 95% interval of a paired bootstrap.

    A resample takes the same queries for both of a pair, and for all pairs.
    """
    ones = torch.ones(1, len(answers), dtype=torch.float64)

    def difference(weights: Tensor) -> dict[str, Tensor]:
        first, second = ([_nll_and_ece(pair[i], answers, weights) for pair in pairs] for i in (0, 1))
        return {
            name: torch.stack([b[name] - a[name] for a, b in zip(first, second, strict=True)]).mean(0)
            for name in ("nll", "ece")
        }

    value = difference(ones)
    blocks = [difference(weights) for weights in resamples(len(answers), REPEATS, 0, 1000)]
    result = {}
    for name in value:
        resampled = torch.cat([block[name] for block in blocks])
        low, high = torch.quantile(resampled, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        result[name] = {"difference": float(value[name]), "low": low, "high": high}
    return result


def _nll_and_ece(outcome: Predictive, answers: Tensor, weights: Tensor) -> dict[str, Tensor]:
    confidence, index = outcome.probabilities.max(-1)
    of_answer = outcome.probabilities.gather(1, answers.unsqueeze(1))[:, 0].clamp_min(1e-300)
    return {
        "nll": weighted_mean(weights, -of_answer.log()),
        "ece": calibration_error(weights, confidence, index == answers),
    }
