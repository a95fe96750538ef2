"""Novelty: how unlike the training rows an input is, judged by the hidden state that the head reads. Pure functions.

The posterior says where the weights are unsure; it cannot say that an input lies far from everything that the adapter was
trained on. That is measured here, in three steps:

* Coordinates: the state minus the mean of the training rows, in their first principal components, whitened by the covariance
  within classes and scaled to unit length.
* Score: minus the mean cosine to the k nearest training rows. It is higher for stranger inputs, from -1 to 1.
* p-value: p = (1 + #{calibration scores >= score}) / (1 + n) with n held-out rows, a conformal p-value for outliers (Bates
  et al., *Testing for Outliers with Conformal p-values*, Annals of Statistics 2023). For inputs that are exchangeable with
  these rows P(p <= alpha) <= alpha, whatever the score is worth.

Reading and writing the file is in `files.novelty_file`; a drift of the scores over time is in `drift`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

COMPONENTS = 256  # principal components, at most
NEIGHBOURS = 5
MOST_ROWS = 3000  # rows of a reference by default
RIDGE = 0.01  # share of the covariance's mean diagonal that is added to its diagonal
BLOCK = 2_000_000  # cosines in memory at once


@dataclass(frozen=True, eq=False)
class NoveltyReference:
    """What an adapter knows: its training rows as unit vectors, and the map from hidden states to such vectors.

    Attributes:
        mean: [D] float32, subtracted from a state.
        projection: [P, D] float32, the whitened principal components.
        rows: [N, P] float32, unit vectors.
        probe: [P] float32, the unit vector of a test prompt, from which one sees whether the base model is the same.
        calibration: [n] float64, the scores of held-out rows, ascending; None before the calibration.
        neighbours: k, how many of the nearest rows a score averages.
    """

    mean: Tensor
    projection: Tensor
    rows: Tensor
    probe: Tensor
    calibration: Tensor | None = None
    neighbours: int = NEIGHBOURS

    def coordinates(self, states: Tensor) -> Tensor:
        """Hidden states [B, D] as unit vectors [B, P]."""
        return torch.nn.functional.normalize((states.float().cpu() - self.mean) @ self.projection.T, dim=-1)

    def scores(self, states: Tensor) -> Tensor:
        """Novelty scores of hidden states: [B, D] -> [B] float64, higher is stranger."""
        unit = self.coordinates(states)
        k = min(self.neighbours, len(self.rows))
        step = max(1, BLOCK // len(self.rows))
        nearest = [(part @ self.rows.T).topk(k, dim=-1).values.double().mean(-1) for part in torch.split(unit, step)]
        return -torch.cat(nearest)

    def calibrated(self, scores: Tensor) -> NoveltyReference:
        """The same reference with the scores [n] of held-out rows, which must not be among its own rows."""
        return replace(self, calibration=scores.double().sort().values)

    def p_values(self, scores: Tensor) -> Tensor | None:
        """Conformal p-values [B] float64 of scores [B]; None if there is no calibration."""
        return None if self.calibration is None else p_values(self.calibration, scores)


def p_values(calibration: Tensor, scores: Tensor) -> Tensor:
    """(1 + #{calibration >= score}) / (1 + n): scores [B] -> [B] float64, in (0, 1].

    Args:
        calibration: [n], ascending, float64.
    """
    below = torch.searchsorted(calibration, scores.double())
    return (1 + len(calibration) - below).double() / (1 + len(calibration))


def fit_reference(
    states: Tensor, classes: Tensor, probe: Tensor, *, most_rows: int = MOST_ROWS, seed: int = 0
) -> NoveltyReference:
    """The reference of an adapter from the hidden states of its training rows.

    Mean and whitening come from all rows. Of more than `most_rows` rows, a random part of each class stays, in proportion.

    Args:
        states: [N, D].
        classes: [N], the answer of each row. The covariance is taken around the mean of each class, so that directions in
            which classes differ count no less than others.
        probe: [D], the state of the test prompt.
        seed: of the choice of rows.

    Raises:
        ValueError: fewer than two rows, or states that are not finite or all equal.
    """
    if len(states) < 2:
        raise ValueError(f"a novelty reference needs at least two rows, and there are {len(states)}")
    x = states.double().cpu()
    if not bool(torch.isfinite(x).all()):
        raise ValueError("the hidden states have values that are not finite")
    mean = x.mean(0)
    x = x - mean
    components = _principal_components(x)  # [P, D]
    x = x @ components.T
    within = x - _class_means(x, classes)[torch.unique(classes, return_inverse=True)[1]]
    covariance = within.T @ within / len(x)
    if float(covariance.trace()) <= 1e-12 * float(x.square().sum() / len(x)):  # each class is a single point
        covariance = x.T @ x / len(x)
    scale = float(covariance.diagonal().mean())
    if scale <= 0:
        raise ValueError("the hidden states are all equal")
    covariance += RIDGE * scale * torch.eye(len(covariance), dtype=torch.float64)
    whitening = torch.linalg.inv(torch.linalg.cholesky(covariance))
    # Only directions matter. With entries of at most 1 the matrix can be stored in float16.
    projection = whitening @ components
    projection = projection / projection.abs().max()
    chosen = covering_rows(classes, most_rows, seed)
    nothing = torch.zeros(0, len(components))
    unfinished = NoveltyReference(mean.float(), _as_stored(projection), nothing, nothing)
    rows = _as_stored(unfinished.coordinates(states[chosen]))
    return replace(unfinished, rows=rows, probe=unfinished.coordinates(probe.unsqueeze(0))[0])


def covering_rows(classes: Tensor, most: int, seed: int = 0) -> Tensor:
    """Indices, ascending, of at most `most` rows: a random part of each class [N], in proportion to its size.

    Every class keeps at least one row if there are no more classes than `most`.
    """
    count = len(classes)
    if count <= most:
        return torch.arange(count)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(count))
    order = order[classes[order].argsort(stable=True)]
    sizes = torch.unique(classes, return_counts=True)[1].tolist()
    parts = [max(1, size * most // count) for size in sizes]
    while sum(parts) > most:
        parts[parts.index(max(parts))] -= 1
    for place in sorted(range(len(sizes)), key=lambda i: parts[i] - sizes[i] * most / count):  # the largest remainders
        if sum(parts) < most and parts[place] < sizes[place]:
            parts[place] += 1
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    chosen = [order[start : start + part] for start, part in zip(starts, parts, strict=True)]
    return torch.cat(chosen).sort().values


def _principal_components(x: Tensor) -> Tensor:
    """The first principal components of centred rows [N, D]: [P, D] float64, orthonormal, P at most `COMPONENTS`."""
    variances, vectors = torch.linalg.eigh(x.T @ x / len(x))  # ascending
    rank = int((variances > 1e-10 * variances[-1]).sum())
    components: Tensor = vectors.T.flip(0)[: max(1, min(COMPONENTS, rank))]
    return components


def _class_means(x: Tensor, classes: Tensor) -> Tensor:
    """The mean of each class, in ascending order of the classes."""
    _, index, counts = torch.unique(classes, return_inverse=True, return_counts=True)
    means: Tensor = x.new_zeros(len(counts), x.shape[1]).index_add_(0, index, x) / counts.unsqueeze(1)
    return means


def _as_stored(tensor: Tensor) -> Tensor:
    """A tensor as it is after it was stored in float16, so that a reference is the same before and after it was written."""
    return tensor.half().float()


def rows_for_level(level: float) -> int:
    """How many calibration rows a level needs, so that some input can be flagged at all."""
    return math.ceil(1 / level - 1 - 1e-9)
