"""KL steps as in the authors' published code: an SGD step on the KL after each optimiser step on the likelihood.

As in BayesAdapt (Samplawski et al. 2025), the learning rate warms up and then falls linearly, and is multiplied by BLoB's
cyclic weight (Wang et al., NeurIPS 2024, after Blundell et al. 2015). The KL is not divided by the number of training rows.
BayesAdapt stores the logarithm of mu, so the step on mu is taken on ln |mu|; the sign of mu does not change. The default
way, with the KL in the loss, is in `trainer`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from scalabl.model.posterior import kl_divergence
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.training.recipe import TrainingConfig

GAMMA = 8.0  # BLoB's gamma, which determines the length of a cycle


def cycle_length(num_examples: int, batch_size: int) -> int:
    """The length of a cycle in steps: M = 100 N^(pi / gamma) / batch size."""
    return max(1, int(100 * num_examples ** (math.pi / GAMMA) / batch_size))


def kl_rate(step: int, recipe: TrainingConfig, num_examples: int) -> float:
    """Learning rate of the KL step at a step counted from 0: linear up and down, times 2^i / (2^(M + 1) - 1), i = 1 … M."""
    warmup, last = int(recipe.max_steps * recipe.warmup_fraction), recipe.max_steps
    linear = step / warmup if step < warmup else max(0.0, (last - step) / max(1, last - warmup))
    cycle = cycle_length(num_examples, recipe.batch_size * recipe.gradient_accumulation_steps)
    exponent = step % cycle + 1
    return recipe.kl_learning_rate * linear * math.ldexp(1.0, exponent - cycle - 1) / (1 - math.ldexp(1.0, -cycle - 1))


class KLSteps(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
    """Takes a step on the KL after each optimiser step. It has no state, so that an interrupted run resumes exactly."""

    def __init__(self, model: ScalaBLModel, recipe: TrainingConfig, num_examples: int) -> None:
        self._model, self._recipe, self._num_examples = model, recipe, num_examples

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        rate = kl_rate(state.global_step, self._recipe, self._num_examples)
        for layer in self._model.adapted.values():
            mean, log_std = (p.detach().requires_grad_() for p in (layer.s_mean, layer.s_log_std))
            kl = kl_divergence(mean, log_std, self._model.config.prior_std, self._recipe.kl_direction)
            by_mean, by_log_std = torch.autograd.grad(kl, (mean, log_std))
            with torch.no_grad():
                layer.s_mean.mul_(torch.exp(-rate * layer.s_mean * by_mean))  # d KL / d ln |mu| = mu * d KL / d mu
                layer.s_log_std.sub_(rate * by_log_std)
