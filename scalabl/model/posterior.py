"""The posterior over the subspace scalars, its draws, and the KL divergence to the prior, as pure functions.

The adapter's parameters are in `layer`. A posterior is a mixture of M members with equal weights; most have one.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

Scheme = Literal["gaussian", "antithetic", "sobol"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
FACTOR = "posterior.covariance_factor"  # the factor's name among an adapter's tensors
DEFAULT_SCHEME: Scheme = "sobol"  # benchmarks/draws.py: the smallest error at K = 16


@dataclass(frozen=True, eq=False)
class Draws:
    """K standard-normal draws, one epsilon for every adapted layer, of M members in turn.

    Attributes:
        epsilon: [K, P] float32 on the CPU; P is the number of a member's stochastic scalars, in the model's layer order.
        start: the position of the first draw in the sequence that `draw_members` gives for seed, scheme and M; None for
            other draws.
        members: M; draw k belongs to member (first_member + k) mod M.
    """

    seed: int
    scheme: Scheme
    epsilon: Tensor
    start: int | None = None
    members: int = 1
    first_member: int = 0

    @property
    def num_samples(self) -> int:
        return int(self.epsilon.shape[0])

    @cached_property
    def member(self) -> Tensor:
        """[K] int64, the member that each draw belongs to."""
        return (self.first_member + torch.arange(self.num_samples)) % self.members

    @cached_property
    def key(self) -> Hashable:
        """Equal for equal draws: draws with the same key can share sampled scalars in a pass, and cached prefixes."""
        members = self.members, self.first_member
        if self.start is None:
            return blake2b(self.epsilon.numpy().tobytes(), digest_size=16).digest(), *members, *self.epsilon.shape
        return self.seed, self.scheme, self.start, *members, *self.epsilon.shape

    def part(self, start: int, stop: int) -> Draws:
        """Draws `start` to `stop` - 1 of the same sequence."""
        return replace(
            self,
            epsilon=self.epsilon[start:stop],
            start=None if self.start is None else self.start + start,
            first_member=(self.first_member + start) % self.members,
        )

    def of_member(self, member: int) -> Draws:
        """The draws of one member, as draws for an adapter that has this member alone."""
        own = self.epsilon[self.member == member]
        first = (member - self.first_member) % self.members
        start = None if self.start is None else (self.start + first) // self.members
        return Draws(member_seed(self.seed, member), self.scheme, own, start)

    def scaled(self, factor: float) -> Draws:
        """The same draws times a factor: as drawn from a posterior whose sigma is larger by that factor."""
        return replace(self, epsilon=factor * self.epsilon, start=None)


def draw(seed: int, num_samples: int, dimension: int, scheme: Scheme = DEFAULT_SCHEME) -> Draws:
    """K draws of P standard normals as a pure function of the arguments; the first j of K draws do not depend on K.

    * `gaussian`: independent.
    * `antithetic`: draws 2i and 2i + 1 are +e and -e, which cancels every odd term of the integrand.
    * `sobol`: a scrambled Sobol sequence through the inverse normal CDF.

    The bits come from Philox 4x64, whose stream numpy guarantees across versions and machines; Sobol from torch.

    Args:
        seed: 0 <= seed < 2**63.
        num_samples: K >= 1.
        dimension: P >= 1.

    Raises:
        ValueError: an argument out of range, an unknown scheme, or more dimensions than torch's Sobol tables hold.
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
        largest = torch.quasirandom.SobolEngine.MAXDIM
        if dimension > largest:
            raise ValueError(f"sobol draws support {largest} dimensions and this adapter has {dimension}; use antithetic")
        engine = torch.quasirandom.SobolEngine(dimension, scramble=True, seed=seed)  # type: ignore[no-untyped-call]  # torch
        # A scrambled point can be exactly 0, where the inverse normal CDF is infinite: stay half a step away from 0 and 1.
        uniform = engine.draw(num_samples, dtype=torch.float64).clamp(2.0**-31, 1 - 2.0**-31)
        epsilon = torch.special.ndtri(uniform)
    else:
        raise ValueError(f"draw scheme {scheme!r} is unknown; use one of {', '.join(SCHEMES)}")
    return Draws(seed, scheme, epsilon.float().contiguous(), start=0)


def _normals(seed: int, count: int, dimension: int) -> Tensor:
    bits = np.random.Philox(key=seed).random_raw(count * dimension)
    uniform = ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53  # in (0, 1), both ends excluded
    normal: Tensor = torch.special.ndtri(torch.from_numpy(uniform))
    return normal.view(count, dimension)


def member_seed(seed: int, member: int) -> int:
    """The seed of a member's own sequence: member m draws as an adapter of its own does with seed + m."""
    return (seed + member) % 2**63


def draw_members(seed: int, num_samples: int, dimension: int, members: int = 1, scheme: Scheme = DEFAULT_SCHEME) -> Draws:
    """K draws for a mixture of M members, draw k for member k mod M. With one member they are those of `draw`.

    Each member has a sequence of its own, so the first j of K draws do not depend on K, and any consecutive draws are shared
    out evenly over the members, up to one.

    Args:
        members: M >= 1, at most K.

    Raises:
        ValueError: fewer samples than members; and as for `draw`.
    """
    if members == 1:
        return draw(seed, num_samples, dimension, scheme)
    if num_samples < members:
        raise ValueError(
            f"num_samples is {num_samples}, and the adapter is a mixture of {members} members, and each needs a sample; "
            f"use at least {members}"
        )
    longest = -(-num_samples // members)
    sequences = [draw(member_seed(seed, member), longest, dimension, scheme).epsilon for member in range(members)]
    epsilon = torch.stack(sequences, dim=1).flatten(0, 1)[:num_samples]
    return Draws(seed, scheme, epsilon.contiguous(), start=0, members=members)


def zero_draw(dimension: int, members: int = 1) -> Draws:
    """A draw with epsilon = 0 for each member: every subspace scalar at its mean in that member."""
    return Draws(0, "gaussian", torch.zeros(members, dimension), members=members)


@dataclass(frozen=True, eq=False)
class Posterior:
    """q(s) over the scalars of all adapted layers: a mixture with equal weights of N(mean_m, F_m F_m^T), m < M.

    Scalars are independent, F_m = tau diag(sigma_m), or have a full covariance, F_m = tau factor_m. Whatever depends on this
    is in the methods.

    Attributes:
        mean, log_std: [M, P]; sigma = exp(log_std) are the standard deviations, whether scalars are independent or not.
        scale: tau, the adapter's `posterior_scale`.
        factor: [M, P, P], lower triangular; None for independent scalars.
    """

    mean: Tensor
    log_std: Tensor
    scale: float = 1.0
    factor: Tensor | None = None

    def sample(self, epsilon: Tensor, member: Tensor | None = None) -> Tensor:
        """s = mean_m + F_m epsilon: [N, P] -> [N, P]; differentiable in mean and log_std.

        Args:
            member: [N] int64, the member of each row; None if there is only one.
        """
        epsilon = epsilon.to(self.mean.device)
        if self.factor is not None:
            return self._correlated(epsilon, member)
        deviation = self.scale * self.log_std.exp()
        if member is None:
            return self.mean + deviation * epsilon
        member = member.to(self.mean.device)
        return self.mean[member] + deviation[member] * epsilon

    def _correlated(self, epsilon: Tensor, member: Tensor | None) -> Tensor:
        assert self.factor is not None
        if member is None:
            return self.mean + self.scale * epsilon @ self.factor[0].T
        member = member.to(self.mean.device)
        s = self.mean[member]
        for which, factor in enumerate(self.factor):
            own = member == which
            s[own] = s[own] + self.scale * epsilon[own] @ factor.T
        return s

    def by_deviations(self, jacobian: Tensor) -> Tensor:
        """J F, the derivatives by epsilon instead of by s: [..., M, C, P] -> [..., M, C, P], in J's dtype and device."""
        if self.factor is not None:
            return self.scale * jacobian @ self.factor.to(jacobian)
        return jacobian * (self.scale * self.log_std.to(jacobian).exp()).unsqueeze(-2)

    def by_covariance(self, jacobian: Tensor) -> Tensor:
        """J F F^T: [..., M, C, P] -> [..., M, C, P], in J's dtype and device."""
        if self.factor is not None:
            return self.scale * self.by_deviations(jacobian) @ self.factor.to(jacobian).mT
        return self.by_deviations(self.by_deviations(jacobian))

    def detached(self) -> Posterior:
        """The same numbers without a graph, on the CPU."""
        mean, log_std = (tensor.detach().cpu() for tensor in (self.mean, self.log_std))
        return Posterior(mean, log_std, self.scale, None if self.factor is None else self.factor.detach().cpu())

    @property
    def relative_spread(self) -> float:
        """Median tau sigma / |mu| over all scalars of all members."""
        mean, log_std = self.mean.detach(), self.log_std.detach()
        return self.scale * float((log_std.exp() / mean.abs().clamp_min(1e-12)).median())


KLDirection = Literal["q_p", "p_q"]


def kl_divergence(mean: Tensor, log_std: Tensor, prior_std: float, direction: KLDirection = "q_p") -> Tensor:
    """KL between q = N(mean, exp(log_std)^2) and p = N(0, prior_std^2), summed over all scalars, in nats; q is one member.

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


def prior_penalty(mean: Tensor, prior_std: float) -> Tensor:
    """-ln p(mu) for the prior N(0, prior_std^2) without its constant, in nats: the sum of mu^2 / (2 prior_std^2)."""
    return (mean / prior_std).square().sum() / 2
