"""From logits [B, K, C] to probabilities, entropies and mutual information, in nats, with their standard errors.

Pure functions of tensors: no model and no data set.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scalabl.model.posterior import Scheme


@dataclass(frozen=True)
class StandardErrors:
    """Monte Carlo standard errors of the fields of `Predictive`, same shapes; NaN where K is too small for one."""

    probabilities: Tensor
    entropy: Tensor
    expected_entropy: Tensor
    mutual_information: Tensor


@dataclass(frozen=True)
class Predictive:
    """The predictive of B inputs from K posterior samples. All float64; entropies in nats.

    Attributes:
        probabilities: [B, C], the mean over samples of softmax(z_k / T).
        entropy: [B], H(probabilities): total uncertainty.
        expected_entropy: [B], the mean over samples of H(softmax(z_k / T)): aleatoric.
        mutual_information: [B], their difference: epistemic. 0 <= it <= entropy <= ln C.
        sample_probabilities: [B, K, C], softmax(z_k / T).
        standard_error: of the first four.
    """

    probabilities: Tensor
    entropy: Tensor
    expected_entropy: Tensor
    mutual_information: Tensor
    sample_probabilities: Tensor
    standard_error: StandardErrors

    def of_input(self, index: int) -> Predictive:
        """The predictive of one of the B inputs, without the leading dimension."""
        fields = {name: value[index] for name, value in vars(self).items() if isinstance(value, Tensor)}
        errors = {name: value[index] for name, value in vars(self.standard_error).items()}
        return Predictive(**fields, standard_error=StandardErrors(**errors))

    @staticmethod
    def stack(outcomes: Sequence[Predictive]) -> Predictive:
        """The predictive of several inputs from the predictives of single ones (`of_input`)."""
        errors = [vars(outcome.standard_error) for outcome in outcomes]
        fields = [name for name, value in vars(outcomes[0]).items() if isinstance(value, Tensor)]
        return Predictive(
            **{name: torch.stack([getattr(outcome, name) for outcome in outcomes]) for name in fields},
            standard_error=StandardErrors(**{name: torch.stack([error[name] for error in errors]) for name in errors[0]}),
        )

    @staticmethod
    def concatenated(parts: Sequence[Predictive]) -> Predictive:
        """The predictive of all inputs of several predictives."""
        errors = [vars(part.standard_error) for part in parts]
        fields = [name for name, value in vars(parts[0]).items() if isinstance(value, Tensor)]
        return Predictive(
            **{name: torch.cat([getattr(part, name) for part in parts]) for name in fields},
            standard_error=StandardErrors(**{name: torch.cat([error[name] for error in errors]) for name in errors[0]}),
        )


def predictive(logits: Tensor, temperature: float = 1.0, scheme: Scheme = "gaussian", members: int = 1) -> Predictive:
    """The Bayesian model average and its uncertainty.

    Mutual information is computed as mean_k KL(p_k || mean p), as a sum of terms that are each non-negative, and not as
    the difference of two entropies, so that small values keep their digits.

    The standard errors are first-order (delta method): with p the mean, H(p) varies with sample k as the cross-entropy
    -sum_c p_kc ln p_c, and mutual information as KL(p_k || p). The two draws of an antithetic pair count as one.
    For Sobol draws the independent-sample formula is used, which overstates the error. The members of a mixture are strata:
    each has its share of every K samples, so that only the spread within members is an error (`standard_error`).

    Args:
        logits: [B, K, C] (or any leading dimensions in place of B), finite.
        temperature: T > 0, divides the logits.
        scheme: how the K samples were drawn.
        members: M; sample k is of member k mod M.

    Raises:
        ValueError: logits that are not finite, fewer than two classes, or no sample.
    """
    if logits.dim() < 2 or logits.shape[-1] < 2 or logits.shape[-2] < 1:
        raise ValueError(f"logits need shape [..., K >= 1, C >= 2], got {tuple(logits.shape)}")
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}; it must be above 0")
    z = logits.double() / temperature
    if not all_finite(z):
        raise ValueError("the logits are not finite; the adapter may be damaged")
    num_samples, num_classes = z.shape[-2:]
    log_p = torch.log_softmax(z, dim=-1)  # [B, K, C]
    p = log_p.exp()
    log_mean = torch.logsumexp(log_p, dim=-2) - math.log(num_samples)  # [B, C]
    mean = log_mean.exp()

    # Every log here is finite and at worst ~ -1e4 / T, where its probability is exactly 0: no 0 * inf can arise.
    sample_entropy = -(p * log_p).sum(-1)  # [B, K]
    cross_entropy = -(p * log_mean.unsqueeze(-2)).sum(-1)  # [B, K], mean over K: H(mean)
    divergence = (p * (log_p - log_mean.unsqueeze(-2)) - p + mean.unsqueeze(-2)).clamp_min(0).sum(-1)  # [B, K]

    entropy = (-(mean * log_mean).sum(-1)).clamp(0, math.log(num_classes))
    mutual_information = torch.minimum(divergence.mean(-1), entropy)
    # A single sample equals the mean, so mutual information is exactly 0, without rounding errors.
    if num_samples == 1:
        mutual_information = torch.zeros_like(mutual_information)
    return Predictive(
        probabilities=mean,
        entropy=entropy,
        expected_entropy=entropy - mutual_information,
        mutual_information=mutual_information,
        sample_probabilities=p,
        standard_error=standard_errors(p, cross_entropy, sample_entropy, divergence, scheme, members),
    )


def all_finite(values: Tensor) -> bool:
    """Whether no value is infinite or NaN. Exact up to float32; float64 values must not overflow in their sum."""
    return math.isfinite(float(values.sum(dtype=torch.float64)))


def degrees_of_freedom(num_samples: int, scheme: Scheme, members: int = 1) -> int:
    """The degrees of freedom of `standard_error`; below 1 if it is NaN.

    A member's independent units are its pairs if they are antithetic, else its samples. Of several members the one with the
    fewest units counts: its spread may be most of the whole, and then the error is no better known than that spread
    (Welch's approximation lies between this and the sum over members).
    """
    own = num_samples // members
    units = own // 2 if scheme == "antithetic" and own > 1 else own
    return units - 1


def standard_errors(
    probabilities: Tensor,
    entropy: Tensor,
    expected_entropy: Tensor,
    mutual_information: Tensor,
    scheme: Scheme,
    members: int = 1,
) -> StandardErrors:
    """Standard errors of the means over the samples of probabilities [..., K, C] and of the other three [..., K]."""
    terms = [probabilities, entropy.unsqueeze(-1), expected_entropy.unsqueeze(-1), mutual_information.unsqueeze(-1)]
    errors = standard_error(torch.cat(terms, dim=-1).transpose(-1, -2), scheme, members)
    return StandardErrors(errors[..., :-3], errors[..., -3], errors[..., -2], errors[..., -1])


def standard_error(values: Tensor, scheme: Scheme, members: int = 1) -> Tensor:
    """Standard error of the mean over the last dimension [..., K] -> [...]; NaN with fewer than two units in a member.

    With M members it is that of a stratified sample: sqrt(sum_m (n_m / K)^2 e_m^2), e_m the standard error of the mean of
    member m's n_m values (Cochran, Sampling Techniques, 1977, eq. 5.6). Value k is of member k mod M.
    """
    count = values.shape[-1]
    if members > 1:
        strata = [values[..., member::members] for member in range(members)]
        errors = [stratum.shape[-1] / count * standard_error(stratum, scheme) for stratum in strata]
        return torch.stack(errors).square().sum(0).sqrt()
    if scheme == "antithetic" and count > 1:
        # Pairs are independent, but not the two draws of a pair. The last of an odd number of draws has no partner.
        paired = count // 2 * 2
        units = values[..., :paired].reshape(*values.shape[:-1], paired // 2, 2).mean(-1)
        if units.shape[-1] < 2:
            return torch.full_like(values[..., 0], math.nan)
        spread: Tensor = units.std(-1) / math.sqrt(units.shape[-1])
        return spread * math.sqrt(paired / count)
    if count < 2:
        return torch.full_like(values[..., 0], math.nan)
    error: Tensor = values.std(-1) / math.sqrt(count)
    return error
