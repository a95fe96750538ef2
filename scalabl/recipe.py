"""The training recipe: plain settings, so that a command line can show them without importing the trainer."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from scalabl.posterior import KLDirection


class TrainingConfig(BaseModel):
    """How an adapter is trained. Each field is an option of `scalabl train`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_steps: int = Field(default=900, ge=1, description="Optimiser steps.")
    batch_size: int = Field(default=16, ge=1, description="Examples per step and device.")
    gradient_accumulation_steps: int = Field(default=1, ge=1, description="Batches per optimiser step.")
    learning_rate: float = Field(default=2e-3, gt=0, description="Peak AdamW learning rate of A, B and mu.")
    sigma_learning_rate: float = Field(
        default=1e-2,
        gt=0,
        description="Peak AdamW learning rate of ln sigma, which has nats to travel, not hundredths.",
    )
    warmup_fraction: float = Field(default=0.06, ge=0, lt=1, description="Share of the steps that warm the rate up.")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW weight decay of A and B.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="Gradient clipping norm.")
    train_samples: int = Field(default=1, ge=1, description="Posterior samples per example in a step.")
    kl_weight: float = Field(default=1.0, ge=0, description="Beta, the weight of KL(q||p)/N; 1 is the exact bound.")
    kl_direction: KLDirection = Field(default="q_p", description="q_p: KL(q||p), the bound's. p_q: the published code's.")
    std_init: float = Field(default=0.05, gt=0, description="Upper end of sigma's start, U(std_init / sqrt 2, std_init).")
    eval_steps: int = Field(default=150, ge=1, description="Steps between validations and checkpoints.")
    eval_samples: int = Field(default=4, ge=1, description="Posterior samples per validation input.")
    early_stopping_patience: int | None = Field(
        default=None, ge=1, description="Stop after this many validations without a lower NLL."
    )
    seed: int = Field(default=0, ge=0, description="Seed of the initialisation, the order and the draws.")
