"""Split-conformal prediction sets: scores of choices, the threshold for a level, and the sets. Pure functions.

LAC: Sadinle, Lei and Wasserman, *Least Ambiguous Set-Valued Classifiers with Bounded Error Levels*, JASA 2019.
APS: Romano, Sesia and Candès, *Classification with Valid and Adaptive Coverage*, NeurIPS 2020; here without their
randomisation, so that the same input always gets the same set.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from scalabl.config import SetMethod
from scalabl.errors import CalibrationError


def set_scores(probabilities: Tensor, method: SetMethod) -> Tensor:
    """The nonconformity score of each choice, lower is better: [..., C] -> [..., C], in [0, 1] up to rounding.

    * `lac`: 1 - p.
    * `aps`: the sum of p over the choice and all more probable ones. Of equally probable choices the first comes first.
    """
    if method == "lac":
        return 1 - probabilities
    order = probabilities.argsort(dim=-1, descending=True, stable=True)
    cumulative = probabilities.gather(-1, order).cumsum(-1)
    return torch.empty_like(probabilities).scatter_(-1, order, cumulative)


def conformal_threshold(scores: Tensor, level: float) -> float:
    """The ceil((n + 1) * level)-th smallest of n scores of true choices.

    The set of all choices with a score up to this threshold contains the true choice with probability at least `level`,
    averaged over calibration sets and exchangeable inputs, and at most `level` + 1 / (n + 1) if no scores are equal.

    Args:
        scores: [N], the scores of the true choices of N inputs.

    Raises:
        CalibrationError: too few scores for the level.
    """
    count = scores.numel()
    rank = math.ceil((count + 1) * level - 1e-9)
    if rank > count:
        needed = math.ceil(level / (1 - level) - 1e-9)
        raise CalibrationError(
            f"prediction sets at level {level:g} need at least {needed} rows for the thresholds and there are {count} "
            "(half of all rows); give more rows or lower --levels"
        )
    return float(scores.kthvalue(rank).values)


def prediction_sets(probabilities: Tensor, method: SetMethod, threshold: float, *, keep_top: bool = True) -> Tensor:
    """Which choices are in the set: [..., C] -> [..., C] bool.

    Args:
        keep_top: always include the most probable choice. A conformal set can be empty, if the model is more accurate than
            the level; a set with the top choice covers the answer at least as often and is more useful.
    """
    members = set_scores(probabilities, method) <= threshold
    if keep_top:
        members = members.scatter(-1, probabilities.argmax(-1, keepdim=True), True)
    return members
