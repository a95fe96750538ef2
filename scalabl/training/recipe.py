"""The training recipe: plain settings, so that a command line can show them without importing the trainer."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from scalabl.model.posterior import KLDirection

# What the authors' published code does differently (BayesAdapt, conf/optim/vi.yaml): the other KL, not divided by N, stepped
# by an SGD of its own whose rate follows BLoB's cycle; sigma has no rate of its own otherwise.
PUBLISHED: dict[str, Any] = {
    "kl_direction": "p_q",
    "kl_optimizer": "sgd",
    "sigma_learning_rate": 2e-3,
    "lr_schedule": "linear",
}


class TrainingConfig(BaseModel):
    """How an adapter is trained. Each field is an option of `scalabl train`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: Literal["elbo", "published"] = Field(
        default="elbo",
        description="Defaults of the options below: the evidence lower bound, or the authors' published code.",
    )
    max_steps: int = Field(default=900, ge=1, description="Optimiser steps.")
    batch_size: int = Field(default=16, ge=1, description="Examples per step and device.")
    gradient_accumulation_steps: int = Field(default=1, ge=1, description="Batches per optimiser step.")
    learning_rate: float = Field(default=2e-3, gt=0, description="Peak AdamW learning rate of A, B and mu.")
    sigma_learning_rate: float = Field(
        default=1e-2,
        gt=0,
        description="Peak AdamW learning rate of ln sigma, which has nats to travel, not hundredths.",
    )
    lr_schedule: Literal["cosine", "linear"] = Field(default="cosine", description="How the rates fall after the warm-up.")
    warmup_fraction: float = Field(default=0.06, ge=0, lt=1, description="Share of the steps that warm the rate up.")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW weight decay of A and B.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="Gradient clipping norm.")
    train_samples: int = Field(default=1, ge=1, description="Posterior samples per example in a step.")
    kl_weight: float = Field(default=1.0, ge=0, description="Beta, the weight of KL(q||p)/N; 1 is the exact bound.")
    kl_direction: KLDirection = Field(default="q_p", description="q_p: KL(q||p), the bound's. p_q: the published code's.")
    kl_optimizer: Literal["joint", "sgd"] = Field(
        default="joint", description="joint: the KL is part of the loss. sgd: steps of its own with a cyclic weight (BLoB)."
    )
    kl_learning_rate: float = Field(default=0.2, gt=0, description="Peak rate of --kl-optimizer sgd; published 0.02 to 0.2.")
    std_init: float = Field(default=0.05, gt=0, description="Upper end of sigma's start, U(std_init / sqrt 2, std_init).")
    eval_steps: int = Field(default=150, ge=1, description="Steps between validations and checkpoints.")
    eval_samples: int = Field(default=4, ge=1, description="Posterior samples per validation input.")
    early_stopping_patience: int | None = Field(
        default=None, ge=1, description="Stop after this many validations without a lower NLL."
    )
    gradient_checkpointing: bool = Field(default=False, description="Less memory for activations, a third more time.")
    trunk_cache_gib: float = Field(
        default=2.0,
        ge=0,
        description="Memory for what enters the first adapted layer, so that those before it run once per row; 0: none.",
    )
    tensorboard: bool = Field(default=False, description="Write TensorBoard logs to <output>/runs.")
    seed: int = Field(default=0, ge=0, description="Seed of the initialisation, the order and the draws.")

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_recipe(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("recipe") == "published":
            return {**PUBLISHED, **values}
        return values
