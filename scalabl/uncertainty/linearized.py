"""The linearised predictive: the model to first order in the subspace scalars, alone or as a control variate for samples.

Only P scalars are random (a few hundred in most models). To first order z(s) = z(mu) + J (s - mu), with J = dz/ds at the
mean. J takes one reverse pass for each choice, and many of them run in one batch. The logits z are then Gaussian over the C
choices, and thousands of samples of them need no pass. This is exact if only the head is adapted, and biased where sigma is
not small compared with mu. A mixture of M members is linearised at the mean of each, and its logits are a mixture of M
Gaussians. Whole data sets are linearised in `evaluation.inference`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from scalabl.model.derivatives import jacobian
from scalabl.model.posterior import Draws, Posterior, draw_members
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.model.token_batch import TokenBatch
from scalabl.uncertainty.absent_choices import ABSENT, OwnChoices, columns_of, presence
from scalabl.uncertainty.predictive import Predictive, StandardErrors, predictive, standard_errors

INTEGRATION_DRAWS = 1024  # samples of the Gaussian over logits, which need no pass
NEGLIGIBLE = 1e-4  # when serving, choices with a lower probability at the mean are not linearised
SPREAD_LIMIT = 0.5  # median tau sigma / |mu| above which the linearisation should not be trusted


@dataclass(frozen=True)
class Linearization:
    """z(s) of B inputs to first order around the mean of each of M members. All float64, on the CPU.

    Attributes:
        mean: [B, M, C], the logits at s = mu; `ABSENT` for a choice that an input does not have.
        jacobian: [B, M, C, P], dz/ds.
        posterior: q(s), whose deviations from the mean the logits follow.
        layers: name of an adapted layer -> its columns of P.
    """

    mean: Tensor
    jacobian: Tensor
    posterior: Posterior
    layers: dict[str, slice]

    @cached_property
    def scaled_jacobian(self) -> Tensor:
        """[B, M, C, P], dz/ds F, the derivatives by epsilon: how much one standard deviation changes each logit."""
        return self.posterior.by_deviations(self.jacobian)

    def logits_at(self, draws: Draws) -> Tensor:
        """[B, K, C]: the linearised logits of the same samples that `ScalaBLModel.logits` uses for these draws."""
        return self._at(draws.epsilon.double(), draws.member, self.scaled_jacobian)

    def _at(self, epsilon: Tensor, member: Tensor, factor: Tensor) -> Tensor:
        """mean_m + factor_m epsilon: epsilon [K, X], member [K], factor [B, M, C, X] -> [B, K, C]."""
        z = self.mean.new_empty(len(self.mean), len(epsilon), self.mean.shape[2])
        for which in range(self.mean.shape[1]):
            own = member == which
            z[:, own] = self.mean[:, which].unsqueeze(1) + epsilon[own] @ factor[:, which].transpose(1, 2)
        return z

    def of_input(self, index: int) -> Linearization:
        """The linearisation of one input, with B = 1."""
        return replace(self, mean=self.mean[index : index + 1], jacobian=self.jacobian[index : index + 1])

    def of_choices(self, choices: OwnChoices) -> Linearization:
        """The linearisation over these choices only, for inputs that have no others."""
        columns = columns_of(choices)
        return replace(self, mean=self.mean[..., columns], jacobian=self.jacobian[..., columns, :])

    def covariance(self) -> Tensor:
        """Cov(z) = (J F) (J F)^T of each member, [B, M, C, C]."""
        return self.scaled_jacobian @ self.scaled_jacobian.transpose(-1, -2)

    def samples(self, num_samples: int = INTEGRATION_DRAWS) -> Tensor:
        """[B, N, C]: Sobol samples of the members' N(mean, covariance), the same at every call; at least as many of each."""
        covariance = self.covariance()
        members, choices = self.mean.shape[1:]
        # A covariance of rank below C has no Cholesky factor without jitter, which is too small to show in an answer.
        jitter = 1e-10 * covariance.diagonal(dim1=-2, dim2=-1).amax(-1).clamp_min(1e-12)
        factor = torch.linalg.cholesky(covariance + jitter[..., None, None] * torch.eye(choices))
        draws = draw_members(0, -(-num_samples // members) * members, choices, members, "sobol")
        return self._at(draws.epsilon.double(), draws.member, factor)

    def predictive(self, temperature: float = 1.0) -> Predictive:
        """The predictive of the linearised model. Standard errors are NaN, since its error is not due to sampling."""
        outcome = predictive(self.samples(), temperature, "sobol")
        unknown = torch.full_like(outcome.entropy, math.nan)
        error = StandardErrors(torch.full_like(outcome.probabilities, math.nan), unknown, unknown, unknown)
        return replace(outcome, standard_error=error)

    def layer_shares(self, temperature: float = 1.0) -> dict[str, Tensor]:
        """The share of each adapted layer in the posterior variance of the probabilities, [B] each; they sum to 1.

        It is the variance of softmax(z / T) to first order, summed over choices and members. The variances of independent
        scalars add up. With a full covariance a layer's share is the covariance of its part of the probabilities with their
        whole, over the variance of the whole. These add up too; one is below 0 where the other layers balance that layer.
        How much the members differ from each other is no layer's.
        """
        p = torch.softmax(self.mean / temperature, -1).unsqueeze(-1)  # [B, M, C, 1]

        def of_probabilities(of_logits: Tensor) -> Tensor:  # [B, M, C, P], over T
            return p * (of_logits - (p * of_logits).sum(-2, keepdim=True))

        covaried = of_probabilities(self.posterior.by_covariance(self.jacobian))
        variance = (of_probabilities(self.jacobian) * covaried).sum((1, 2))  # [B, P]
        total = variance.sum(1).clamp_min(1e-300)
        return {name: variance[:, columns].sum(1) / total for name, columns in self.layers.items()}


def linearize(
    model: ScalaBLModel,
    batch: TokenBatch,
    *,
    choices: Sequence[OwnChoices] | None = None,
    negligible: float = 0.0,
    states: Tensor | None = None,
) -> Linearization:
    """Linearise B inputs around the mean of each member. The arguments are those of `slopes`."""
    mean, derivatives = slopes(model, batch, choices=choices, negligible=negligible, states=states)
    columns = {name: slice(i * model.config.r, (i + 1) * model.config.r) for i, name in enumerate(model.adapted)}
    return Linearization(mean, derivatives, model.posterior().detached(), columns)


def slopes(
    model: ScalaBLModel,
    batch: TokenBatch,
    *,
    choices: Sequence[OwnChoices] | None = None,
    negligible: float = 0.0,
    states: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """z(mu) [B, M, C] and dz/ds there [B, M, C, P]: a row of the passes for each member and choice of each input.

    Args:
        choices: the choices of each input; None for all of the task's. Others have the logit `ABSENT`.
        negligible: choices with a lower probability at every member's mean are not linearised and cost no row, except for
            each member's two most probable. Finding them takes one more forward pass over B * M rows.
        states: as of `ForwardPass`, of a batch that is right-padded.

    Returns:
        Both float64, on the CPU.
    """
    present = torch.ones(batch.input_ids.shape[0], model.num_choices, dtype=torch.bool)
    if choices is not None:
        present = presence(choices, model.num_choices)
    active = present
    if negligible > 0:
        z = model.logits(batch, model.mean_draw(), states).cpu().masked_fill(~present.unsqueeze(1), ABSENT)  # [B, M, C]
        likely = torch.softmax(z.double() / model.config.temperature, -1) >= negligible
        active = likely.scatter(2, z.topk(2, dim=-1).indices, True).any(1) & present
    mean, derivatives = jacobian(model, batch, active, states=states)
    return mean.double().cpu().masked_fill(~present.unsqueeze(1), ABSENT), derivatives.double().cpu()


def controlled(logits: Tensor, linear: Linearization, draws: Draws, temperature: float = 1.0) -> Predictive:
    """The predictive of K samples, with the linearisation as a control variate.

    f(z_k) - f(z_k linearised) + E[f(z linearised)] has the same expectation as f(z_k), and little variance if the two are
    close. Probabilities and expected entropy are thus estimated without bias. Entropy and mutual information are computed
    from them, and clamped to their ranges if noise has led outside. The standard errors are those of the corrected terms,
    within members, with an antithetic pair as one term; for Sobol draws they overstate the error.

    Args:
        logits: [B, K, C] under `draws`, finite.
        linear: of the same inputs.
    """
    sampled = predictive(logits, temperature, draws.scheme, draws.members)
    linearised = predictive(linear.logits_at(draws), temperature, draws.scheme, draws.members)
    exact = predictive(linear.samples(), temperature, "sobol")
    differences = sampled.sample_probabilities - linearised.sample_probabilities  # [B, K, C]
    p = (exact.probabilities + differences.mean(1)).clamp_min(1e-12)
    p = p / p.sum(-1, keepdim=True)
    terms = _entropies(sampled.sample_probabilities) - _entropies(linearised.sample_probabilities)  # [B, K]
    entropy = _entropies(p)
    expected = torch.minimum((exact.expected_entropy + terms.mean(1)).clamp_min(0), entropy)
    cross = -(differences * p.log().unsqueeze(1)).sum(-1)  # the effect of a sample on H(p), to first order
    error = standard_errors(differences, cross, terms, cross - terms, draws.scheme, draws.members)
    return Predictive(p, entropy, expected, entropy - expected, sampled.sample_probabilities, error)


def _entropies(p: Tensor) -> Tensor:
    entropies: Tensor = torch.special.entr(p).sum(-1)
    return entropies
