"""Scores of predictions, such as accuracy, NLL and calibration errors, computed for many weightings of the inputs at once.

A weighting is a row of `weights` [R, N], which says how often each input counts. Weights of 1 give the score itself; the
counts of a bootstrap resample give the score of that resample. All numbers are float64. Doubt scores are in `uncertainty`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from scalabl.uncertainty.predictive import Predictive
from scalabl.uncertainty.selective import doubts

BINS = 15


def weighted_mean(weights: Tensor, values: Tensor) -> Tensor:
    """Mean of values [N] for weights [R, N] -> [R]."""
    return weights @ values.double() / weights.sum(1)


def bins_of(confidence: Tensor) -> Tensor:
    """The bin of each probability: 15 of equal width, which include their upper bound (Guo et al. 2017). [...] -> [...]."""
    return ((confidence * BINS).ceil().long() - 1).clamp(0, BINS - 1)


def calibration_error(weights: Tensor, confidence: Tensor, hit: Tensor) -> Tensor:
    """ECE: |mean confidence - accuracy| in bins of equal width, weighted by inputs. [R, N], [N], [N] -> [R]."""
    gaps = weights.new_zeros(len(confidence), BINS).scatter_(1, bins_of(confidence).unsqueeze(1), _gap(confidence, hit))
    return (weights @ gaps).abs().sum(1) / weights.sum(1)


def _gap(confidence: Tensor, hit: Tensor) -> Tensor:
    return (confidence - hit.double()).unsqueeze(-1)


def adaptive_calibration_error(weights: Tensor, confidence: Tensor, hit: Tensor) -> Tensor:
    """ECE in 15 bins with equal numbers of inputs (Nguyen and O'Connor 2015). [R, N], [N], [N] -> [R]."""
    order = confidence.argsort(stable=True)
    sorted_weights = weights[:, order]
    middle = (sorted_weights.cumsum(1) - sorted_weights / 2) / weights.sum(1, keepdim=True)  # in (0, 1)
    index = (middle * BINS).long().clamp(0, BINS - 1)
    gaps = weights.new_zeros(len(weights), BINS)
    gaps.scatter_add_(1, index, sorted_weights * _gap(confidence, hit)[order, 0])
    return gaps.abs().sum(1) / weights.sum(1)


def classwise_calibration_error(weights: Tensor, probabilities: Tensor, answers: Tensor) -> Tensor:
    """Mean over choices of the ECE of each choice's own probability (Kull et al. 2019). [R, N], [N, C], [N] -> [R]."""
    choices = range(probabilities.shape[1])
    errors = [calibration_error(weights, probabilities[:, choice], answers == choice) for choice in choices]
    return torch.stack(errors).mean(0)


def auroc(weights: Tensor, score: Tensor, positive: Tensor) -> Tensor:
    """P(a positive scores higher than a negative), ties count half; NaN without either. [R, N], [N], [N] bool -> [R]."""
    groups, index = torch.unique(score, return_inverse=True)
    above, below = (weights.new_zeros(len(weights), len(groups)).index_add_(1, index, w) for w in _split(weights, positive))
    pairs = above * (below.cumsum(1) - below / 2)
    return pairs.sum(1) / (above.sum(1) * below.sum(1))


def _split(weights: Tensor, positive: Tensor) -> tuple[Tensor, Tensor]:
    return weights * positive, weights * ~positive


def aurc(weights: Tensor, doubt: Tensor, wrong: Tensor) -> Tensor:
    """As `selective.aurc`. [R, N], [N], [N] bool -> [R]."""
    groups, index = torch.unique(doubt, return_inverse=True)
    here = weights.new_zeros(len(weights), len(groups)).index_add_(1, index, weights)
    errors = weights.new_zeros(len(weights), len(groups)).index_add_(1, index, weights * wrong)
    answered = here.cumsum(1)
    risk = errors.cumsum(1) / answered.clamp_min(1e-300)  # where nothing is answered, the weight is 0 as well
    return (here * risk).sum(1) / weights.sum(1)


def passing_rate(inner: Tensor, inside: Tensor, outer: Tensor, outside: Tensor, share: float = 0.95) -> Tensor:
    """The share of inputs outside that pass where at least this share of those inside do: the "FPR at 95%". [R].

    Args:
        inner, outer: weights [R, N] and [R, N'] of the inputs inside and outside.
        inside, outside: their scores [N] and [N']; the inputs with the lowest scores pass.
    """
    order = inside.argsort()
    passed = inner[:, order].cumsum(1)
    place = torch.searchsorted(passed, share * passed[:, -1:] - 1e-9).clamp_max(len(inside) - 1)  # [R, 1]
    threshold = inside[order][place]
    return (outer * (outside.unsqueeze(0) <= threshold)).sum(1) / outer.sum(1)


def labelled_scores(outcome: Predictive, answers: Tensor, weights: Tensor | None = None) -> dict[str, Tensor]:
    """Every score of N predictions whose true answers are known, [R] each; without weights R = 1.

    Accuracy, NLL (nats), ECE in three forms, Brier score, mean entropy and mutual information, and for each doubt score the
    AUROC with which it detects wrong answers (NaN when none or all are wrong) and the area under its risk-coverage curve.
    """
    p = outcome.probabilities
    weights = _ones(outcome) if weights is None else weights
    confidence, index = p.max(-1)
    hit = index == answers
    truth = torch.nn.functional.one_hot(answers, p.shape[1])
    result = {
        "accuracy": weighted_mean(weights, hit),
        "nll": weighted_mean(weights, -p.gather(1, answers.unsqueeze(1))[:, 0].clamp_min(1e-300).log()),
        "ece": calibration_error(weights, confidence, hit),
        "ece_adaptive": adaptive_calibration_error(weights, confidence, hit),
        "ece_classwise": classwise_calibration_error(weights, p, answers),
        "brier": weighted_mean(weights, (p - truth).square().sum(-1)),
        "entropy": weighted_mean(weights, outcome.entropy),
        "mutual_information": weighted_mean(weights, outcome.mutual_information),
    }
    for name, doubt in doubts(outcome).items():
        result[f"auroc_wrong_{name}"] = auroc(weights, doubt, ~hit)
        result[f"aurc_{name}"] = aurc(weights, doubt, ~hit)
    return result


def scores(outcome: Predictive, answers: Tensor) -> dict[str, float]:
    """The scores of `labelled_scores` as numbers, without those that are NaN. `answers` [N] are indices of choices."""
    values = {name: float(value) for name, value in labelled_scores(outcome, answers).items()}
    return {name: value for name, value in values.items() if not math.isnan(value)}


def outside_scores(
    inside: Predictive,
    outside: Predictive,
    inner: Tensor | None = None,
    outer: Tensor | None = None,
    *,
    novelty: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:
    """How well doubt scores and novelty detect inputs outside the choices; mean uncertainty of those inputs; [R] each.

    `auroc_ood_…` is the area under the ROC curve, `fpr95_ood_…` the `passing_rate` at 95%.

    Args:
        novelty: the novelty scores of the inputs inside [N] and outside [N'] of the choices, if there are any.
        inner, outer: weights of the inputs inside [R, N] and outside [R, N'] of the choices; None for 1.
    """
    inner, outer = (_ones(o) if w is None else w for o, w in ((inside, inner), (outside, outer)))
    weights, is_outer = torch.cat([inner, outer], dim=1), torch.arange(inner.shape[1] + outer.shape[1]) >= inner.shape[1]
    elsewhere = doubts(outside)
    compared: dict[str, tuple[Tensor, Tensor]] = {name: (here, elsewhere[name]) for name, here in doubts(inside).items()}
    if novelty is not None:
        compared["novelty"] = novelty
    result = {}
    for name, (here, there) in compared.items():
        result[f"auroc_ood_{name}"] = auroc(weights, torch.cat([here, there]), is_outer)
        result[f"fpr95_ood_{name}"] = passing_rate(inner, here, outer, there)
    result["ood_entropy"] = weighted_mean(outer, outside.entropy)
    result["ood_mutual_information"] = weighted_mean(outer, outside.mutual_information)
    return result


def _ones(outcome: Predictive) -> Tensor:
    return torch.ones(1, len(outcome.entropy), dtype=torch.float64)


def resamples(count: int, repeats: int, seed: int, block: int) -> Iterator[Tensor]:
    """`repeats` bootstrap weightings of `count` inputs, in blocks [R, N] of at most `block` rows."""
    generator = np.random.default_rng(seed)
    even = np.full(count, 1 / count)
    for start in range(0, repeats, block):
        yield torch.from_numpy(generator.multinomial(count, even, size=min(block, repeats - start))).double()


def interval(value: float, resampled: Tensor, confidence: float = 0.95) -> tuple[float, float]:
    """A bootstrap interval of a score: the percentiles of its resampled values, minus the bias of their mean.

    Noise makes binned calibration errors larger; without the correction they would lie outside their own intervals.

    Args:
        resampled: [R], the score of each resample; NaN where it is not defined.
    """
    defined = resampled[~resampled.isnan()]
    tail = (1 - confidence) / 2
    low, high = torch.quantile(defined, torch.tensor([tail, 1 - tail], dtype=defined.dtype)).tolist()
    bias = float(defined.mean()) - value
    return max(0.0, low - bias), max(0.0, high - bias)
