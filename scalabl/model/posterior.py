"""Posterior draws and the KL divergence to the prior, as pure functions. The adapter's parameters are in `layer`."""

from __future__ import annotations

import logging
from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from hashlib import blake2b
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

Scheme = Literal["gaussian", "antithetic", "sobol"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
DEFAULT_SCHEME: Scheme = "sobol"  # benchmarks/draws.py: the smallest error at K = 16
SOBOL_SCALARS = torch.quasirandom.SobolEngine.MAXDIM  # that torch has direction numbers for

logger = logging.getLogger("scalabl")


@dataclass(frozen=True, eq=False)
class Draws:
    """K standard-normal draws, one epsilon for every adapted layer.

    Attributes:
        epsilon: [K, P] float32 on the CPU; P is the number of stochastic scalars, in the model's layer order.
        start: the position of the first draw in the sequence that `draw` gives for seed and scheme; None for other draws.
    """

    seed: int
    scheme: Scheme
    epsilon: Tensor
    start: int | None = None

    @property
    def num_samples(self) -> int:
        return int(self.epsilon.shape[0])

    @cached_property
    def key(self) -> Hashable:
        """Equal for equal draws: draws with the same key can share sampled scalars in a pass, and cached prefixes."""
        if self.start is None:
            return blake2b(self.epsilon.numpy().tobytes(), digest_size=16).digest(), *self.epsilon.shape
        return self.seed, self.scheme, self.start, *self.epsilon.shape

    def part(self, start: int, stop: int) -> Draws:
        """Draws `start` to `stop` - 1 of the same sequence."""
        return replace(self, epsilon=self.epsilon[start:stop], start=None if self.start is None else self.start + start)

    def scaled(self, factor: float) -> Draws:
        """The same draws times a factor: as drawn from a posterior whose sigma is larger by that factor."""
        return replace(self, epsilon=factor * self.epsilon, start=None)


def draw(seed: int, num_samples: int, dimension: int, scheme: Scheme = DEFAULT_SCHEME) -> Draws:
    """K draws of P standard normals as a pure function of the arguments; the first j of K draws do not depend on K.

    * `gaussian`: independent.
    * `antithetic`: draws 2i and 2i + 1 are +e and -e, which cancels every odd term of the integrand.
    * `sobol`: a scrambled Sobol sequence through the inverse normal CDF. The scalars after the first `SOBOL_SCALARS`, if
      there are so many, are independent Gaussians.

    The bits come from Philox 4x64, whose stream numpy guarantees across versions and machines; Sobol from torch.

    Args:
        seed: 0 <= seed < 2**63.
        num_samples: K >= 1.
        dimension: P >= 1.

    Raises:
        ValueError: an argument out of range or an unknown scheme.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed is {seed}; it must be at least 0 and below 2**63")
    if num_samples < 1 or dimension < 1:
        raise ValueError(f"num_samples and dimension must be at least 1, got {num_samples} and {dimension}")
    if scheme == "gaussian":
        epsilon = _normals(seed, num_samples, dimension)
    elif scheme == "antithetic":
        half = _normals(seed, (num_samples + 1) // 2, dimension)
        epsilon = torch.stack([half, -half], dim=1).flatten(0, 1)[:num_samples]
    elif scheme == "sobol":
        epsilon = _sobol(seed, num_samples, dimension)
    else:
        raise ValueError(f"draw scheme {scheme!r} is unknown; use one of {', '.join(SCHEMES)}")
    return Draws(seed, scheme, epsilon.float().contiguous(), start=0)


def _sobol(seed: int, num_samples: int, dimension: int) -> Tensor:
    leading = min(dimension, SOBOL_SCALARS)
    engine = torch.quasirandom.SobolEngine(leading, scramble=True, seed=seed)  # type: ignore[no-untyped-call]  # torch
    # A scrambled point can be exactly 0, where the inverse normal CDF is infinite: stay half a step away from 0 and 1.
    uniform = engine.draw(num_samples, dtype=torch.float64).clamp(2.0**-31, 1 - 2.0**-31)
    normal: Tensor = torch.special.ndtri(uniform)
    if dimension == leading:
        return normal
    _say_mixed(dimension)
    return torch.cat([normal, _normals(seed, num_samples, dimension - leading)], dim=1)


@cache
def _say_mixed(dimension: int) -> None:
    """Say once for each size of adapter that not all of its scalars have Sobol draws."""
    logger.warning(
        "the adapter has %d stochastic scalars: the first %d get Sobol draws and the others independent Gaussian draws",
        dimension,
        SOBOL_SCALARS,
    )


def _normals(seed: int, count: int, dimension: int) -> Tensor:
    bits = np.random.Philox(key=seed).random_raw(count * dimension)
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # in (0, 1), both ends excluded
    normal: Tensor = torch.special.ndtri(torch.from_numpy(uniform))
    return normal.view(count, dimension)


def zero_draw(dimension: int) -> Draws:
    """The single draw with epsilon = 0: every subspace scalar at its posterior mean."""
    return Draws(0, "gaussian", torch.zeros(1, dimension))


KLDirection = Literal["q_p", "p_q"]


def kl_divergence(mean: Tensor, log_std: Tensor, prior_std: float, direction: KLDirection = "q_p") -> Tensor:
    """KL between q = N(mean, exp(log_std)^2) and p = N(0, prior_std^2), summed over all scalars, in nats.

    `q_p` is KL(q || p), the one in the evidence lower bound. `p_q` is KL(p || q), which the authors' published code uses.

    Args:
        mean, log_std: [P].
    """
    log_ratio = log_std - float(np.log(prior_std))  # log(sigma_q / sigma_p)
    if direction == "q_p":
        terms = 0.5 * (torch.exp(2 * log_ratio) + (mean / prior_std) ** 2 - 1) - log_ratio
    elif direction == "p_q":
        terms = 0.5 * (torch.exp(-2 * log_ratio) + (mean * torch.exp(-log_std)) ** 2 - 1) + log_ratio
    else:
        raise ValueError(f"kl direction {direction!r} is unknown; use q_p or p_q")
    return terms.sum()
