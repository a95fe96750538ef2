"""The settings of a training run and of a fit, which are the options of `scalabl train` and `scalabl fit`.

They are apart from `trainer` and `posterior_fit` so that the command line can show them without importing these.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from scalabl.config import Covariance
from scalabl.model.posterior import KLDirection
from scalabl.uncertainty.novelty import MOST_ROWS

MOST = 2**31 - 1  # the largest of the counts below: what the libraries hold in an integer
# Defaults of the authors' published code (BayesAdapt, conf/optim/vi.yaml) that differ from ours: KL(p||q), not divided by N,
# minimised by separate SGD steps with BLoB's cyclic weight; sigma has the same AdamW learning rate as the rest.
PUBLISHED: dict[str, Any] = {
    "kl_direction": "p_q",
    "kl_optimizer": "sgd",
    "sigma_learning_rate": 2e-3,
    "lr_schedule": "linear",
}


# MAP training, then a Laplace fit: the means are learned without samples, and with no term for sigma.
MAP_LAPLACE: dict[str, Any] = {"posterior": "laplace"}
DEFAULTS = {"published": PUBLISHED, "map-laplace": MAP_LAPLACE}


class FitConfig(BaseModel):
    """How a posterior is fitted around a trained adapter. Each field is an option of `scalabl fit`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_rows: int = Field(
        default=1000, ge=1, description="Most training rows to use, chosen at random; they stand for all of them."
    )
    covariance: Covariance = Field(
        default="full",
        description="full: all scalars together, across layers. diagonal: each scalar by itself, for any number of them.",
    )
    prior_precision: float | None = Field(
        default=None,
        gt=0,
        description="Precision of the prior of each scalar in units of its mean: 4 for a standard deviation of half the "
        "mean (default: 1; with --validation, the one of the lowest held-out NLL).",
    )
    evidence: bool = Field(
        default=False, description="Take the prior precision of the highest evidence (marginal likelihood)."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the choice of rows and of the random signs.")

    @model_validator(mode="after")
    def _one_precision(self) -> Self:
        if self.evidence and self.prior_precision is not None:
            raise ValueError("evidence chooses the prior precision; leave out prior_precision")
        return self


class TrainingConfig(BaseModel):
    """How an adapter is trained. Each field is an option of `scalabl train`, and its description is the option's help."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: Literal["elbo", "published", "map-laplace"] = Field(
        default="elbo",
        description="Defaults of the options below: elbo, the evidence lower bound; published, as in the authors' code; "
        "map-laplace, training without samples and a posterior fitted afterwards.",
    )
    posterior: Literal["variational", "laplace"] = Field(
        default="variational",
        description="variational: mu and sigma are trained together. laplace: mu is trained without samples, with the prior "
        "as a weight decay of mu (MAP); then a fit to the training rows gives sigma, as `scalabl fit` does.",
    )
    fit_rows: int = Field(default=1000, ge=1, description="With --posterior laplace: most training rows for the fit.")
    fit_covariance: Covariance = Field(
        default="full", description="With --posterior laplace: full, across all layers; diagonal, of independent scalars."
    )
    max_steps: int = Field(default=900, ge=1, le=MOST, description="Optimiser steps.")
    batch_size: int = Field(default=16, ge=1, le=MOST, description="Examples per step and device.")
    gradient_accumulation_steps: int = Field(
        default=1, ge=1, le=MOST, description="Batches whose gradients are added up for one optimiser step."
    )
    learning_rate: float = Field(default=2e-3, gt=0, description="Peak AdamW learning rate of A, B and mu.")
    sigma_learning_rate: float = Field(
        default=1e-2,
        gt=0,
        description="Peak AdamW learning rate of ln sigma. It is higher, since ln sigma changes far more than A, B and mu.",
    )
    head_learning_rate: float = Field(
        default=2e-3, gt=0, description="Peak AdamW learning rate of the rows of --head fresh."
    )
    lr_schedule: Literal["cosine", "linear"] = Field(
        default="cosine", description="How the learning rates fall after the warm-up."
    )
    warmup_fraction: float = Field(
        default=0.06, ge=0, lt=1, description="Share of the steps in which the learning rates rise from 0."
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW weight decay of A and B.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="Norm to which gradients are clipped.")
    train_samples: int = Field(default=1, ge=1, le=MOST, description="Posterior samples per example in a step.")
    kl_weight: float = Field(
        default=1.0, ge=0, description="Beta, the weight of KL/N in the loss; 1 gives the evidence lower bound."
    )
    kl_direction: KLDirection = Field(
        default="q_p", description="q_p: KL(q||p), as in the bound. p_q: KL(p||q), as in the authors' code."
    )
    kl_optimizer: Literal["joint", "sgd"] = Field(
        default="joint",
        description="joint: the KL is part of the loss. sgd: separate SGD steps on the KL, with a cyclic weight (BLoB).",
    )
    kl_learning_rate: float = Field(
        default=0.2, gt=0, description="Peak learning rate of --kl-optimizer sgd; the authors use 0.02 to 0.2."
    )
    std_init: float = Field(default=0.05, gt=0, description="Sigma starts at random between std_init / sqrt 2 and std_init.")
    eval_steps: int = Field(default=150, ge=1, le=MOST, description="Steps between validations and checkpoints.")
    eval_samples: int = Field(default=4, ge=1, le=MOST, description="Posterior samples per validation input.")
    early_stopping_patience: int | None = Field(
        default=None,
        ge=1,
        le=MOST,
        description="Stop after this many validations without a lower NLL (negative log-likelihood).",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="Recompute activations in the backward pass: less memory, about a third more time."
    )
    trunk_cache_gib: float = Field(
        default=2.0,
        ge=0,
        description="GiB for caching the first adapted layer's inputs, so that earlier layers run once per row; 0: off.",
    )
    novelty: bool = Field(default=True, description="Write a novelty reference beside the adapter, from the training rows.")
    novelty_rows: int = Field(
        default=MOST_ROWS, ge=2, description="The most training rows that the novelty reference keeps."
    )
    tensorboard: bool = Field(default=False, description="Write TensorBoard logs to <output>/runs.")
    seed: int = Field(
        default=0,
        ge=0,
        lt=2**32,
        description="Random seed of the initialisation, the order of examples and the posterior draws.",
    )

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_recipe(cls, values: Any) -> Any:
        if isinstance(values, dict):
            return {**DEFAULTS.get(str(values.get("recipe")), {}), **values}
        return values

    @model_validator(mode="after")
    def _options_agree(self) -> Self:
        if self.posterior == "laplace" and (self.kl_optimizer, self.kl_direction, self.train_samples) != ("joint", "q_p", 1):
            raise ValueError(
                "posterior laplace trains without samples and without sigma; leave out kl_optimizer, kl_direction and "
                "train_samples"
            )
        return self

    @property
    def fit(self) -> FitConfig:
        """The settings of the fit with `posterior` laplace."""
        return FitConfig(max_rows=self.fit_rows, covariance=self.fit_covariance, seed=self.seed)
