"""Training an adapter by stochastic variational inference: the loss, and a subclass of transformers' Trainer.

The settings are in `recipe`, the separate KL steps of the published code in `published`, and what keeps the runs in their
folders apart in `run_folder`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME

from scalabl.config import AdapterConfig
from scalabl.evaluation.encoded import EncodedSet
from scalabl.evaluation.inference import logits_of, predictive_of
from scalabl.evaluation.novelty_fit import write_reference
from scalabl.evaluation.scoring import scores
from scalabl.files.adapter_directory import adapter_from, load_weights, read_weights, save_adapter
from scalabl.files.output_folder import CHECKPOINTS, LOGS
from scalabl.files.peft_import import relative_log_std
from scalabl.model.forward_pass import ForwardPass, RowSamples, checkpoint_contexts
from scalabl.model.posterior import kl_divergence, prior_penalty
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.model.token_batch import TokenBatch
from scalabl.passes.probes import find_shared_work
from scalabl.passes.trunk_cache import TrunkCache, trunk_cache
from scalabl.training.posterior_fit import check_size, fit_posterior, forget_state
from scalabl.training.published import KLSteps
from scalabl.training.recipe import TrainingConfig
from scalabl.training.run_folder import Origin, TrainingRun, begin, find_run, finish


class VariationalModule(nn.Module):
    """The module that the Trainer trains: its output is the loss, an adapter's negative evidence lower bound.

    Loss per batch, in nats: the mean over examples and samples of -log p(y | x, s), plus beta * KL(q||p) / N, with N the
    number of training examples (Samplawski et al. 2025, section 3). Every row draws its own s, so that the gradient's
    noise averages out within the batch. With `kl_optimizer` sgd the loss is the first part alone (`published.KLSteps`).
    With `posterior` laplace it is the loss of a MAP estimate: s is at its mean, and the KL is -ln p(mu), without sigma.

    Args:
        trunk: the cached trunk states of the training set's rows; None without a cache.
    """

    def __init__(
        self, model: ScalaBLModel, recipe: TrainingConfig, num_examples: int, trunk: TrunkCache | None = None
    ) -> None:
        super().__init__()
        self.model, self.recipe, self.num_examples, self._trunk = model, recipe, num_examples, trunk

    def forward(
        self, input_ids: Tensor, lengths: Tensor, num_choices: Tensor, labels: Tensor, row: Tensor | None = None
    ) -> dict[str, Tensor]:
        """input_ids [B, T] right-padded; lengths, num_choices, labels [B] -> scalars `loss`, `nll`, `kl`.

        `row` [B] has the examples' row numbers in the training set, to look up their cached trunk states.
        """
        count, repeat = len(input_ids), self.recipe.train_samples
        of_row = torch.arange(count, device=input_ids.device).repeat_interleave(repeat)  # [M]
        shape = len(of_row), self.model.num_stochastic_parameters
        epsilon = (torch.zeros if self.recipe.posterior == "laplace" else torch.randn)(shape, device=input_ids.device)
        sample = torch.arange(len(of_row), device=input_ids.device)
        samples = RowSamples(self.model.sample(epsilon), sample, repeat, of_row if repeat > 1 else None)
        states = None if self._trunk is None or row is None else self._trunk.of(row, input_ids.shape[1])
        logits = self.model.run(ForwardPass(input_ids, lengths, samples, states=states))  # [M, C]
        num_choices, labels = num_choices[of_row], labels[of_row]
        absent = torch.arange(logits.shape[1], device=logits.device) >= num_choices.unsqueeze(1)
        nll = nn.functional.cross_entropy(logits.masked_fill(absent, -math.inf), labels)
        posterior, prior_std = self.model.posterior(), self.model.config.prior_std
        if self.recipe.posterior == "laplace":
            kl = prior_penalty(posterior.mean, prior_std)
        else:
            kl = kl_divergence(posterior.mean, posterior.log_std, prior_std, self.recipe.kl_direction)
        weight = self.recipe.kl_weight / self.num_examples if self.recipe.kl_optimizer == "joint" else 0.0
        return {"loss": nll + weight * kl, "nll": nll, "kl": kl}


def _collate(rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    ids, lengths = TokenBatch.of([row["input_ids"] for row in rows]).right_padded()
    columns = {name: torch.tensor([row[name] for row in rows]) for name in ("num_choices", "labels", "row")}
    return {"input_ids": ids, "lengths": lengths, **columns}


def _rows(encoded: EncodedSet) -> list[dict[str, Any]]:
    return [
        {"input_ids": ids, "num_choices": int(count), "labels": int(answer), "row": row}
        for row, (ids, count, answer) in enumerate(zip(encoded.sequences, encoded.num_choices, encoded.answers, strict=True))
    ]


class LengthGroupedSampler(Sampler[int]):
    """Yields every index once per epoch, in batches of similar length: a pure function of (seed, epoch).

    transformers' own sampler uses the global random generator, so a run resumed within an epoch would get other batches.
    """

    WINDOW = 50  # batches whose examples are sorted by length together

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths, self._batch_size, self._seed, self._epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = np.random.default_rng((self._seed, self._epoch))
        order = generator.permutation(len(self._lengths))
        window = self.WINDOW * self._batch_size
        grouped = np.concatenate(
            [sorted(order[i : i + window], key=self._lengths.__getitem__) for i in range(0, len(order), window)]
        )
        full = len(grouped) // self._batch_size * self._batch_size
        batches = grouped[:full].reshape(-1, self._batch_size)
        yield from generator.permutation(batches).flatten().tolist()
        yield from grouped[full:].tolist()  # an incomplete batch can only be the last


class VariationalTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped
    """transformers' Trainer, whose checkpoints are adapter directories and whose validation scores the predictive."""

    def __init__(self, module: VariationalModule, validation: EncodedSet, trunk: TrunkCache | None, **kwargs: Any) -> None:
        self.optimizer: torch.optim.Optimizer | None
        self.control: TrainerControl
        super().__init__(model=module, eval_dataset=_rows(validation), data_collator=_collate, **kwargs)
        self.module, self.validation = module, validation
        self._states = None if trunk is None else trunk.of
        self.model_accepts_loss_kwargs = (
            False  # the loss is already a mean; the Trainer averages it over accumulated batches
        )
        self.terms: dict[str, float] = {}

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        output: dict[str, Tensor] = model(**inputs)
        self.terms = {"nll": output["nll"].item(), "kl": output["kl"].item()}
        return output["loss"]

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        lengths = [len(row["input_ids"]) for row in self.train_dataset]
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return LengthGroupedSampler(lengths, batch_size, self.args.seed)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            logs = {**logs, **self.terms}
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Scores of the K-sample predictive on the validation set; `eval_loss` is its NLL."""
        model, recipe = self.module.model, self.module.recipe
        model.eval()
        has_posterior = recipe.posterior == "variational" or model.config.posterior_fit is not None
        draws = model.draws(recipe.eval_samples, seed=recipe.seed) if has_posterior else model.mean_draw()
        logits = logits_of(model, self.validation.sequences, draws, states=self._states)
        outcome = predictive_of(logits, self.validation.num_choices, model, draws)
        metrics = {f"eval_{name}": value for name, value in scores(outcome, self.validation.answers).items()}
        metrics["eval_loss"] = metrics.pop("eval_nll")
        posterior = model.posterior()
        metrics["eval_median_sigma"] = float(posterior.log_std.detach().exp().median())
        metrics["eval_median_abs_mu"] = float(posterior.mean.detach().abs().median())
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            parameters = self.module.model.adapter_parameters().items()
            groups: dict[str, list[nn.Parameter]] = {"lora_A": [], "lora_B": [], "s_mean": [], "s_log_std": [], "weight": []}
            for name, parameter in parameters:
                groups[name.rpartition(".")[2]].append(parameter)
            rate, decay = self.args.learning_rate, self.args.weight_decay
            head_rate = self.module.recipe.head_learning_rate
            self.optimizer = torch.optim.AdamW(
                [
                    {"params": groups["lora_A"] + groups["lora_B"], "lr": rate, "weight_decay": decay},
                    # No weight decay: the prior regularises the scalars.
                    {"params": groups["s_mean"], "lr": rate, "weight_decay": 0.0},
                    {"params": groups["s_log_std"], "lr": self.module.recipe.sigma_learning_rate, "weight_decay": 0.0},
                    *([{"params": groups["weight"], "lr": head_rate, "weight_decay": decay}] if groups["weight"] else []),
                ]
            )
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        model = self.module.model
        save_adapter(Path(output_dir or str(self.args.output_dir)), model.config, dict(model.adapter_parameters()))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(self.module.model, read_weights(Path(resume_from_checkpoint)))

    def finish_training(self, checkpoint: str | None) -> None:
        """Train on from a checkpoint, or from the start, and end with the weights of the best validation."""
        state = None if checkpoint is None else TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        if state is None or state.global_step < self.args.max_steps:
            self.train(resume_from_checkpoint=checkpoint)
        else:  # transformers would take one more step
            self.state = state
            self._load_best_model()

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)


@torch.no_grad()
def _start_from(model: ScalaBLModel, start: Mapping[str, Tensor]) -> None:
    for name, parameter in model.adapter_parameters().items():
        if name in start:
            parameter.copy_(start[name])
        elif name.endswith(".s_log_std"):
            mean = start[name.replace(".s_log_std", ".s_mean")].to(parameter.device)
            parameter.copy_(relative_log_std(mean, parameter.exp()))


def _last_whole_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint, recognised by the Trainer's state file, which is written last."""
    checkpoints = [path for path in folder.glob("checkpoint-*") if _is_json(path / TRAINER_STATE_NAME)]
    return str(max(checkpoints, key=lambda path: int(path.name.rpartition("-")[2]))) if checkpoints else None


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return True


@dataclass(frozen=True)
class StartingPoint:
    """Initial A, B and mu of every layer (`peft_import.adapter_of`), and the LoRA that they come from."""

    tensors: Mapping[str, Tensor]
    origin: Origin


@dataclass(frozen=True)
class Trained:
    """The outcome of `train_adapter`.

    Attributes:
        metrics: the scores on the validation rows, and the numbers of stochastic and of all additional parameters.
        was_finished: whether the same run had finished before, so that nothing was done.
    """

    metrics: Mapping[str, float]
    was_finished: bool = False


def train_adapter(
    base: PreTrainedModel,
    config: AdapterConfig,
    recipe: TrainingConfig,
    train: EncodedSet,
    validation: EncodedSet,
    output: Path,
    start: StartingPoint | None = None,
    caches: tuple[TrunkCache | None, TrunkCache | None] | None = None,
    *,
    overwrite: bool = False,
) -> Trained:
    """Train a new adapter and write it to `output`. An interrupted run is resumed from `output/checkpoints`.

    The result is the adapter that had the lowest NLL in a validation. If the same run has finished, nothing is done.

    Args:
        start: where A, B and mu start; the initial sigma is then a share of mu.
        caches: trunk caches of `train` and `validation` from another run with the same trunk; created here if None.
        overwrite: remove the adapter and the checkpoints in `output`, and start anew.

    Raises:
        OutputError: `output` belongs to another run, or cannot be written.
        FitError: more scalars than the fit's covariance supports.
    """
    run = TrainingRun.of(config, recipe, train, validation, None if start is None else start.origin, base)
    previous = find_run(output, run, overwrite=overwrite)
    if previous is not None and previous.result is not None:
        return Trained(previous.result.metrics, was_finished=True)
    set_seed(recipe.seed)
    model = ScalaBLModel(base, config)
    model.reset_adapter(recipe.seed, recipe.std_init)
    if start is not None:
        _start_from(model, start.tensors)
    find_shared_work(model)
    if recipe.posterior == "laplace":
        check_size(model.num_stochastic_parameters, recipe.fit, "--fit-covariance")
    if previous is None:
        begin(output, run)
    if recipe.gradient_checkpointing:
        # Renamed in transformers 5.20; the old name warns.
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False, "context_fn": checkpoint_contexts})
    if recipe.tensorboard:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(output / LOGS)
    checkpoints = output / CHECKPOINTS
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=recipe.max_steps,
        per_device_train_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        learning_rate=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        warmup_steps=round(recipe.warmup_fraction * recipe.max_steps),
        lr_scheduler_type=recipe.lr_schedule,
        max_grad_norm=recipe.max_grad_norm,
        bf16=base.device.type == "cuda",
        seed=recipe.seed,
        logging_steps=10,
        eval_strategy="steps",
        eval_steps=recipe.eval_steps,
        save_strategy="steps",
        save_steps=recipe.eval_steps,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
        remove_unused_columns=False,
        dataloader_pin_memory=base.device.type == "cuda",
        report_to=["tensorboard"] if recipe.tensorboard else [],
    )
    callbacks: list[TrainerCallback] = []
    if recipe.kl_optimizer == "sgd":
        callbacks.append(KLSteps(model, recipe, len(train.sequences)))
    if recipe.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=recipe.early_stopping_patience))
    trunks = caches or tuple(trunk_cache(model, rows.sequences, recipe.trunk_cache_gib) for rows in (train, validation))
    module = VariationalModule(model, recipe, len(train.sequences), trunks[0])
    trainer = VariationalTrainer(
        module, validation, trunks[1], args=arguments, train_dataset=_rows(train), callbacks=callbacks
    )
    trainer.finish_training(_last_whole_checkpoint(checkpoints))
    if recipe.posterior == "laplace":
        fitted = fit_posterior(model, train, recipe.fit, output)
        model = module.model = adapter_from(base, fitted.config, fitted.weights)
    metrics = trainer.evaluate()
    save_adapter(output, model.config, dict(model.adapter_parameters()))
    if recipe.novelty:
        write_reference(output, model.eval(), train, most_rows=recipe.novelty_rows, trunk=trunks[0])
    forget_state(output)
    metrics["stochastic_parameters"] = model.num_stochastic_parameters
    metrics["additional_parameters"] = sum(p.numel() for p in model.adapter_parameters().values())
    finish(output, run, metrics)
    return Trained(metrics)
