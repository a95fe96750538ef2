"""A Laplace approximation over the subspace scalars: from the curvature of the log-likelihood to a Gaussian around the mean.

Pure mathematics; the curvature of a data set is computed in `training.posterior_fit`. The Hessian of the negative
log-likelihood is approximated by the generalised Gauss-Newton matrix H = sum_n J_n^T (diag(p_n) - p_n p_n^T) J_n, with
J_n = dz/ds at the mean, which has no negative eigenvalue (Schraudolph 2002; Daxberger et al., "Laplace Redux", NeurIPS
2021). With the prior N(0, 1 / precision), q(s) = N(mu, (H + precision I)^-1).

The prior is relative: it is that of s / scale, with the scale of a scalar taken from its mean (`prior_scale`). A LoRA's
scalars are singular values, which differ a hundredfold, and how much of their size is in A and B is arbitrary. One prior for
all of them would be as wide as the large ones need, and drown the small ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

EXACT = 1e-3  # contrasts with a pivot of at least this get a reverse pass of their own
NOTHING = 1e-9  # sum of pivots below which a row says nothing of the scalars
PRECISIONS = (1e-6, 1e6)  # bounds of the search for a prior precision
SMALLEST_SCALE = 0.01  # of the root mean square of a layer's scalars


def softmax_root(logits: Tensor, signs: np.random.Generator, *, exact: float = EXACT) -> Tensor:
    """Few vectors v_m with sum_m v_m v_m^T = diag(p) - p p^T in expectation, for p = softmax(logits).

    The Cholesky factor of diag(p) - p p^T has a closed form (Tanabe and Sagae 1992). With the choices in descending order of
    probability and t_c = sum_{i > c} p_i, its column c is sqrt(d_c) (e_c - sum_{i > c} (p_i / t_c) e_i) with the pivot
    d_c = p_c t_c / t_{c-1}: the choice c against all less probable ones. Most of the C - 1 pivots are tiny. Columns with a
    pivot of `exact` or more are kept. The others are added up with random signs to one vector, whose outer product has the
    right expectation (Hutchinson 1990). So a row of which the model is sure needs one reverse pass instead of C.

    Args:
        logits: [C], `absent_choices.ABSENT` for a choice that the input does not have.
        signs: the source of the random signs.
        exact: 0 keeps every column; nothing is random then.

    Returns:
        [m, C] float64 with 0 <= m < C.
    """
    p, order = torch.softmax(logits.double(), -1).sort(descending=True)
    before = p.flip(0).cumsum(0).flip(0)  # [C], t_{c-1}
    after = before[1:].clamp_min(1e-300)  # [C - 1], t_c
    pivots = torch.where(before[1:] > 0, p[:-1] * after / before[:-1], 0.0)  # [C - 1]
    alone = (pivots >= exact) & (pivots > 0)
    vectors = []
    for c in alone.nonzero()[:, 0].tolist():
        column = torch.zeros_like(p)
        column[c] = 1.0
        column[c + 1 :] = -p[c + 1 :] / after[c]
        vectors.append(pivots[c].sqrt() * column)
    rest = torch.where(alone, 0.0, pivots)
    if float(rest.sum()) >= NOTHING:
        steps = torch.from_numpy(signs.choice([-1.0, 1.0], size=len(rest))) * rest.sqrt()
        vectors.append(-p * torch.nn.functional.pad((steps / after).cumsum(0), (1, 0)))
        vectors[-1][:-1] += steps
    root = torch.zeros(len(vectors), len(p), dtype=torch.float64)
    if vectors:
        root[:, order] = torch.stack(vectors)
    return root


def prior_scale(mean: Tensor, rank: int) -> Tensor:
    """The unit in which the prior measures each scalar: |mu|, but at least `SMALLEST_SCALE` of its layer's root mean square.

    Args:
        mean: [M, P], a layer's R scalars next to each other.
        rank: R.

    Returns:
        [M, P] float64, above 0.
    """
    layers = mean.double().abs().reshape(len(mean), -1, rank)  # [M, layers, R]
    size = layers.square().mean(-1, keepdim=True).sqrt()
    return torch.maximum(layers, SMALLEST_SCALE * size).clamp_min(1e-12).flatten(-2)


@dataclass(frozen=True)
class Curvature:
    """The Gauss-Newton matrix H of all training rows for each of M members, by its eigenvalues. All float64.

    H is that of the scalars in units of `scale`, which the prior N(0, 1 / precision) is about.

    Attributes:
        scale: [M, P], the unit of each scalar.
        values: [M, P], the eigenvalues of H, or its diagonal.
        vectors: [M, P, P], the eigenvectors as columns; None if only the diagonal is known, which is then used alone.
    """

    scale: Tensor
    values: Tensor
    vectors: Tensor | None = None

    @classmethod
    def of(cls, matrix: Tensor, scale: Tensor) -> Curvature:
        """From H by the scalars themselves, [M, P, P], or its diagonal, [M, P]."""
        matrix, scale = matrix.double(), scale.double()
        if matrix.dim() == 2:
            return cls(scale, (scale.square() * matrix).clamp_min(0))
        values, vectors = torch.linalg.eigh(scale.unsqueeze(-1) * matrix * scale.unsqueeze(-2))
        return cls(scale, values.clamp_min(0), vectors)

    def determined(self, precision: float) -> float:
        """How many scalars the rows determine rather than the prior: gamma = sum_i h_i / (h_i + precision) (MacKay 1992)."""
        return float((self.values / (self.values + precision)).sum())

    def log_evidence(self, precision: float, mean: Tensor, log_likelihood: float) -> float:
        """The logarithm of the marginal likelihood by Laplace's method, in nats, summed over members.

        ln p(D | mu) - precision |mu / scale|^2 / 2 - sum_i ln((h_i + precision) / precision) / 2 (MacKay 1992, Bayesian
        interpolation), as if mu were the mode under this prior.

        Args:
            mean: mu [M, P].
            log_likelihood: ln p(D | mu), summed over all training rows and members.
        """
        misfit = precision * self._size(mean)
        volume = float(torch.log1p(self.values / precision).sum())
        return log_likelihood - 0.5 * (misfit + volume)

    def likeliest_precision(self, mean: Tensor) -> float:
        """The prior precision of the highest evidence, within `PRECISIONS`.

        There gamma / precision = |mu / scale|^2 (MacKay 1992). The left side falls with the precision, so there is one
        solution.
        """
        size = self._size(mean)

        def excess(log_precision: float) -> float:
            precision = math.exp(log_precision)
            return self.determined(precision) / precision - size

        low, high = (math.log(bound) for bound in PRECISIONS)
        if excess(low) <= 0:
            return PRECISIONS[0]
        if excess(high) >= 0:
            return PRECISIONS[1]
        return math.exp(brentq(excess, low, high, xtol=1e-9))

    def _size(self, mean: Tensor) -> float:
        return float((mean.double() / self.scale).square().sum())

    def factor(self, precision: float) -> Tensor:
        """F with F F^T the covariance of the scalars: lower triangles [M, P, P] with a positive diagonal, or sigma [M, P].

        Computed without the covariance: F is the inverse of the lower triangular L with L^T L = H + precision I, in the
        scalars' own units.
        """
        if self.vectors is None:
            return self.scale * (self.values + precision).rsqrt()
        precisions = (self.vectors * (self.values + precision).unsqueeze(-2)) @ self.vectors.mT
        lower = torch.linalg.cholesky(precisions.flip(-2, -1)).flip(-2, -1).mT  # L
        identity = torch.eye(lower.shape[-1], dtype=torch.float64)
        factor: Tensor = self.scale.unsqueeze(-1) * torch.linalg.solve_triangular(lower, identity, upper=False)
        return factor

    def by_eigenvectors(self, jacobian: Tensor) -> Tensor:
        """Derivatives by the scalars [..., M, C, P] as those along the eigenvectors, if known, in units of `scale`."""
        scaled = jacobian * self.scale.unsqueeze(-2)
        return scaled if self.vectors is None else scaled @ self.vectors
