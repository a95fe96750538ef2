"""The linearised predictive: the model to first order in the subspace scalars, alone or as a control variate for samples.

Only P scalars are random (a few hundred in most models). To first order z(s) = z(mu) + J (s - mu), with J = dz/ds at the
mean. J takes one reverse pass for each choice, and many of them run in one batch. The logits z are then Gaussian over the C
choices, and thousands of samples of them need no pass. This is exact if only the head is adapted, and biased where sigma is
not small compared with mu. Whole data sets are linearised in `evaluation.inference`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scalabl.model.posterior import Draws, draw
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.model.token_batch import TokenBatch
from scalabl.uncertainty.absent_choices import ABSENT
from scalabl.uncertainty.predictive import Predictive, StandardErrors, predictive, standard_errors

INTEGRATION_DRAWS = 1024  # samples of the Gaussian over logits, which need no pass
NEGLIGIBLE = 1e-4  # when serving, choices with a lower probability at the mean are not linearised
SPREAD_LIMIT = 0.5  # median tau sigma / |mu| above which the linearisation should not be trusted


@dataclass(frozen=True)
class Linearization:
    """z(s) of B inputs to first order around the posterior mean. All float64, on the CPU.

    Attributes:
        mean: [B, C], the logits at s = mu; `ABSENT` for a choice that an input does not have.
        scaled_jacobian: [B, C, P], dz/ds times tau sigma: how much one standard deviation of a scalar changes each logit.
        layers: name of an adapted layer -> its columns of P.
        state: [B, D] float32, the hidden state that the head reads at s = mu; None if it is not known.
    """

    mean: Tensor
    scaled_jacobian: Tensor
    layers: dict[str, slice]
    state: Tensor | None = None

    def logits_at(self, draws: Draws) -> Tensor:
        """[B, K, C]: the linearised logits of the same samples that `ScalaBLModel.logits` uses for these draws."""
        return self.mean.unsqueeze(1) + draws.epsilon.double() @ self.scaled_jacobian.transpose(1, 2)

    def of_input(self, index: int) -> Linearization:
        """The linearisation of one input, with B = 1."""
        one = slice(index, index + 1)
        state = None if self.state is None else self.state[one]
        return replace(self, mean=self.mean[one], scaled_jacobian=self.scaled_jacobian[one], state=state)

    def of_choices(self, count: int) -> Linearization:
        """The linearisation of the first `count` choices only, for inputs that have no others."""
        return replace(self, mean=self.mean[:, :count], scaled_jacobian=self.scaled_jacobian[:, :count])

    def covariance(self) -> Tensor:
        """Cov(z) = J diag(tau^2 sigma^2) J^T, [B, C, C]."""
        return self.scaled_jacobian @ self.scaled_jacobian.transpose(1, 2)

    def samples(self, num_samples: int = INTEGRATION_DRAWS) -> Tensor:
        """[B, N, C]: Sobol samples of N(mean, covariance), the same at every call."""
        covariance = self.covariance()
        # A covariance of rank below C has no Cholesky factor without jitter, which is too small to show in an answer.
        jitter = 1e-10 * covariance.diagonal(dim1=1, dim2=2).amax(1).clamp_min(1e-12)
        factor = torch.linalg.cholesky(covariance + jitter.view(-1, 1, 1) * torch.eye(covariance.shape[1]))
        epsilon = draw(0, num_samples, self.mean.shape[1], "sobol").epsilon.double()
        z: Tensor = self.mean.unsqueeze(1) + epsilon @ factor.transpose(1, 2)
        return z

    def predictive(self, temperature: float = 1.0) -> Predictive:
        """The predictive of the linearised model. Standard errors are NaN, since its error is not due to sampling."""
        outcome = predictive(self.samples(), temperature, "sobol")
        unknown = torch.full_like(outcome.entropy, math.nan)
        error = StandardErrors(torch.full_like(outcome.probabilities, math.nan), unknown, unknown, unknown)
        return replace(outcome, standard_error=error)

    def layer_shares(self, temperature: float = 1.0) -> dict[str, Tensor]:
        """The share of each adapted layer in the posterior variance of the probabilities, [B] each; they sum to 1.

        It is the variance of softmax(z / T) to first order, summed over choices. The scalars are independent, so their
        variances add up.
        """
        p = torch.softmax(self.mean / temperature, -1).unsqueeze(-1)  # [B, C, 1]
        moved = p * (self.scaled_jacobian - (p * self.scaled_jacobian).sum(1, keepdim=True))  # [B, C, P], over T
        variance = moved.square().sum(1)  # [B, P]
        total = variance.sum(1).clamp_min(1e-300)
        return {name: variance[:, columns].sum(1) / total for name, columns in self.layers.items()}


def linearize(
    model: ScalaBLModel, batch: TokenBatch, *, num_choices: Tensor | None = None, negligible: float = 0.0
) -> Linearization:
    """Linearise B inputs at the posterior mean: a forward and a reverse pass with a row for each choice of each input.

    Args:
        num_choices: [B], the number of choices of each input; None for all of the task's.
        negligible: choices with a lower probability at the mean are not linearised and cost no row, except for the two most
            probable. Finding them takes one more forward pass over B rows.
    """
    present = torch.ones(batch.input_ids.shape[0], model.num_choices, dtype=torch.bool)
    if num_choices is not None:
        present = torch.arange(model.num_choices) < num_choices.unsqueeze(1)
    active = present
    if negligible > 0:
        z = model.logits(batch, model.mean_draw())[:, 0].cpu().masked_fill(~present, ABSENT)
        likely = torch.softmax(z.double() / model.config.temperature, -1) >= negligible
        active = likely.scatter(1, z.topk(2, dim=-1).indices, True) & present
    mean, jacobian, states = model.jacobian(batch, active)
    _, log_std = model.posterior()
    deviation = model.config.posterior_scale * log_std.detach().double().exp().cpu()
    columns = {name: slice(i * model.config.r, (i + 1) * model.config.r) for i, name in enumerate(model.adapted)}
    mean = mean.double().cpu().masked_fill(~present, ABSENT)
    return Linearization(mean, jacobian.double().cpu() * deviation, columns, states.cpu())


def relative_spread(model: ScalaBLModel) -> float:
    """Median tau sigma / |mu| over all scalars. The linearisation is accurate if this is well below `SPREAD_LIMIT`."""
    mean, log_std = (tensor.detach() for tensor in model.posterior())
    return spread_of(mean, log_std, model.config.posterior_scale)


def spread_of(mean: Tensor, log_std: Tensor, posterior_scale: float) -> float:
    """As `relative_spread`, from the posterior's mean and log_std [P] instead of a model."""
    return posterior_scale * float((log_std.exp() / mean.abs().clamp_min(1e-12)).median())


def controlled(logits: Tensor, linear: Linearization, draws: Draws, temperature: float = 1.0) -> Predictive:
    """The predictive of K samples, with the linearisation as a control variate.

    f(z_k) - f(z_k linearised) + E[f(z linearised)] has the same expectation as f(z_k), and little variance if the two are
    close. Probabilities and expected entropy are thus estimated without bias. Entropy and mutual information are computed
    from them, and clamped to their ranges if noise has led outside. The standard errors are those of the corrected terms,
    with an antithetic pair as one term; for Sobol draws they overstate the error.

    Args:
        logits: [B, K, C] under `draws`, finite.
        linear: of the same inputs.
    """
    sampled = predictive(logits, temperature, draws.scheme)
    linearised = predictive(linear.logits_at(draws), temperature, draws.scheme)
    exact = predictive(linear.samples(), temperature, "sobol")
    differences = sampled.sample_probabilities - linearised.sample_probabilities  # [B, K, C]
    p = (exact.probabilities + differences.mean(1)).clamp_min(1e-12)
    p = p / p.sum(-1, keepdim=True)
    terms = _entropies(sampled.sample_probabilities) - _entropies(linearised.sample_probabilities)  # [B, K]
    entropy = _entropies(p)
    expected = torch.minimum((exact.expected_entropy + terms.mean(1)).clamp_min(0), entropy)
    cross = -(differences * p.log().unsqueeze(1)).sum(-1)  # the effect of a sample on H(p), to first order
    error = standard_errors(differences, cross, terms, cross - terms, draws.scheme)
    return Predictive(p, entropy, expected, entropy - expected, sampled.sample_probabilities, error)


def _entropies(p: Tensor) -> Tensor:
    entropies: Tensor = torch.special.entr(p).sum(-1)
    return entropies
