"""Abstention (selective prediction): doubt scores, the risk-coverage curve, and a threshold with a guaranteed risk.

The risk is the share of wrong answers among the inputs that are answered, the coverage the share of inputs answered.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.special import betainccinv
from torch import Tensor

from scalabl.config import DoubtName
from scalabl.errors import CalibrationError
from scalabl.uncertainty.predictive import Predictive

CANDIDATES = 10  # thresholds that are tested for a target risk, at the deciles of doubt

DOUBTS: dict[DoubtName, Callable[[Predictive], Tensor]] = {
    "mutual_information": lambda outcome: outcome.mutual_information,
    "entropy": lambda outcome: outcome.entropy,
    "confidence": lambda outcome: 1 - outcome.probabilities.max(-1).values,
}


def doubt(outcome: Predictive, name: DoubtName) -> Tensor:
    """A doubt score of B inputs, [B]; higher is less sure. The score `confidence` is 1 - confidence."""
    return DOUBTS[name](outcome)


def doubts(outcome: Predictive) -> dict[DoubtName, Tensor]:
    """All doubt scores of B inputs, by name, [B] each."""
    return {name: doubt(outcome, name) for name in DOUBTS}


def risk_coverage(doubt: Tensor, wrong: Tensor) -> Tensor:
    """The risk when the n surest inputs are answered, for n = 1 … N: [N].

    Inputs of equal doubt are answered together, since a threshold cannot separate them.

    Args:
        doubt, wrong: [N].
    """
    _, index, counts = torch.unique(doubt, return_inverse=True, return_counts=True)
    errors = torch.zeros(len(counts), dtype=torch.float64).scatter_add_(0, index, wrong.double())
    risk: Tensor = errors.cumsum(0) / counts.cumsum(0)
    return risk.repeat_interleave(counts)


def aurc(doubt: Tensor, wrong: Tensor) -> float:
    """Area under the risk-coverage curve (Geifman, Uziel and El-Yaniv, ICLR 2019): the mean of `risk_coverage`."""
    return float(risk_coverage(doubt, wrong).mean())


def binomial_upper_bound(errors: int, count: int, delta: float) -> float:
    """Clopper and Pearson's upper bound of an error rate: the largest p with P(Binomial(count, p) <= errors) >= delta."""
    if errors >= count:
        return 1.0
    # P(Binomial(count, p) <= errors) is 1 minus the regularised incomplete beta function I_p(errors + 1, count - errors).
    return float(betainccinv(errors + 1, count - errors, delta))


def check_rows_for_risk(rows: int, target_risk: float, confidence: float) -> None:
    """Check that there are enough rows to guarantee a target risk if no answer is wrong.

    Args:
        target_risk: above 0.

    Raises:
        CalibrationError: too few rows; the message says how many are needed.
    """
    delta = (1 - confidence) / CANDIDATES
    if rows < 1 or binomial_upper_bound(0, rows, delta) > target_risk:
        needed = math.ceil(math.log(delta) / math.log1p(-target_risk))
        raise CalibrationError(
            f"an abstention threshold for a risk of {target_risk:g} with confidence {confidence:g} needs at least {needed} "
            f"rows for the thresholds and there are {rows} (half of all rows); give more rows, raise --target-risk, "
            "or pass --no-abstain"
        )


@dataclass(frozen=True)
class GuaranteedThreshold:
    """A threshold: inputs with doubt <= `threshold` are answered.

    Attributes:
        coverage: the share of inputs that are answered.
        risk: the share of these answers that were wrong.
        bound: an upper confidence bound of the true risk.
    """

    threshold: float
    coverage: float
    risk: float
    bound: float


def guaranteed_threshold(
    candidates: Tensor, doubt: Tensor, wrong: Tensor, target_risk: float, confidence: float
) -> GuaranteedThreshold:
    """The threshold with the largest coverage among those whose upper bound of the risk is within the target.

    Ten thresholds are tested. They are quantiles of the doubts of other inputs, so each test is an exact binomial test. Each
    bound gets a tenth of the error probability, so that all ten hold together with probability `confidence`.

    Args:
        candidates: [M], doubts of inputs that are not among those of `doubt`.
        doubt, wrong: [N].

    Raises:
        CalibrationError: no threshold reaches the target; the message gives the lowest risk that could be guaranteed.
    """
    delta = (1 - confidence) / CANDIDATES
    quantiles = torch.arange(1, CANDIDATES + 1, dtype=torch.float64) / CANDIDATES
    thresholds = []
    for threshold in torch.quantile(candidates, quantiles, interpolation="higher").tolist():
        answered = doubt <= threshold
        count, errors = int(answered.sum()), int(wrong[answered].sum())
        if count:
            bound = binomial_upper_bound(errors, count, delta)
            thresholds.append(GuaranteedThreshold(threshold, count / len(doubt), errors / count, bound))
    within_target = [candidate for candidate in thresholds if candidate.bound <= target_risk]
    if not within_target:
        best = min((candidate.bound for candidate in thresholds), default=1.0)
        raise CalibrationError(
            f"no abstention threshold keeps the share of wrong answers within {target_risk:g} with confidence "
            f"{confidence:g}: the lowest that {len(doubt)} rows can guarantee is {math.ceil(best * 1000) / 1000:g}; "
            "give more rows, raise --target-risk, or pass --no-abstain"
        )
    return max(within_target, key=lambda candidate: candidate.coverage)
