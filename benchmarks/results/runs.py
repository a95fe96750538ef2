"""The trainings of the study. Each leaves its adapter and logits in the study's folder, and its scores as a small JSON
file beside this module, so that the page can be made, and a study go on, from the repository alone.
"""

from __future__ import annotations

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.machine import describe
from benchmarks.results.lora import fit, lora
from benchmarks.results.scores import ensemble, scores_by_variant
from benchmarks.results.study import NUM_SAMPLES, Study, subset
from scalabl.evaluation.calibration import fit_scale
from scalabl.evaluation.inference import logits_of
from scalabl.files.adapter_directory import load_adapter
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.training.recipe import TrainingConfig
from scalabl.training.trainer import train_adapter

STEPS = {"train": 600, "few": 200}
SEEDS = (0, 1, 2)
DROPOUT = 0.1
Method = Literal["base", "lora", "dropout", "scalabl"]


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        rows: `train` or `few`.
        recipe: what differs from the study's recipe.
        prior_std: of ScalaBL's prior.
        report: what is evaluated: the test set and the queries outside, or (in the sweep) the validation sets alone.
    """

    name: str
    method: Method
    rows: str = "train"
    seed: int = 0
    recipe: tuple[tuple[str, Any], ...] = ()
    prior_std: float = 1.0
    report: Literal["test", "validation"] = "test"

    @property
    def training(self) -> TrainingConfig:
        """The whole recipe."""
        steps = STEPS[self.rows]
        common = {"max_steps": steps, "eval_steps": steps // 4, "eval_samples": 8, "seed": self.seed}
        return TrainingConfig.model_validate(common | dict(self.recipe))


PUBLISHED = (("recipe", "published"),)


def peer_runs() -> list[Run]:
    """The table's trainings that do not follow from the sweep."""
    runs = [Run("base", "base")]
    for seed in SEEDS:
        for rows in ("train", "few"):
            of = {"rows": rows, "seed": seed}
            runs += [
                Run(f"{rows}-lora-{seed}", "lora", **of),
                Run(f"{rows}-published-{seed}", "scalabl", recipe=PUBLISHED, **of),
                Run(f"{rows}-dropout-{seed}", "dropout", **of),
            ]
    return runs


def our_runs() -> list[Run]:
    """The table's trainings by the defaults that follow from the sweep."""
    return [Run(f"{rows}-scalabl-{seed}", "scalabl", rows, seed) for seed in SEEDS for rows in ("train", "few")]


def sweep_runs() -> list[Run]:
    """KL direction, its weight, sigma's start and the prior, one seed each, judged on the validation rows."""
    cells: dict[str, dict[str, Any]] = {
        "q_p, β = 1": {},
        "q_p, β = 0.1": {"kl_weight": 0.1},
        "q_p, β = 10": {"kl_weight": 10.0},
        "p_q, β = 1": {"kl_direction": "p_q"},
        "p_q, β = 0.1": {"kl_direction": "p_q", "kl_weight": 0.1},
        "q_p, β = 1, σ starts at 0.5": {"std_init": 0.5},
        "q_p, β = 1, σ learns like μ": {"sigma_learning_rate": 2e-3},
        "published, SGD 0.2": {"recipe": "published"},
        "published, SGD 0.02": {"recipe": "published", "kl_learning_rate": 0.02},
    }
    runs = [
        Run(f"sweep {name}", "scalabl", recipe=tuple(changes.items()), report="validation")
        for name, changes in cells.items()
    ]
    return [*runs, Run("sweep q_p, β = 1, prior 0.3", "scalabl", prior_std=0.3, report="validation")]


SCORES = Path(__file__).parent / "runs"


def scores_of(name: str) -> dict[str, Any] | None:
    """What a run found; None before it has finished."""
    path = SCORES / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def execute(study: Study, run: Run) -> None:
    """Train, evaluate and keep the scores."""
    folder = study.folder / run.name
    folder.mkdir(exist_ok=True)
    began = time.perf_counter()
    logits, notes = {"base": _base, "lora": _lora, "dropout": _dropout, "scalabl": _scalabl}[run.method](study, run, folder)
    save_file({name: tensor.clone() for name, tensor in logits.items()}, folder / "logits.safetensors")
    notes |= {"run": dataclasses.asdict(run), "seconds": round(time.perf_counter() - began), "machine": describe()}
    keep(run.name, notes | {"scores": scores_by_variant(study, run, logits, notes)})


def keep(name: str, found: dict[str, Any]) -> None:
    """Write what a run found."""
    SCORES.mkdir(exist_ok=True)
    (SCORES / f"{name}.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


Result = tuple[dict[str, Tensor], dict[str, Any]]


def _base(study: Study, run: Run, folder: Path) -> Result:
    model = study.model(target_modules=("lm_head",), layers_to_transform=None)  # B = 0: the base model's own logits
    found = {}
    for name in ("validation", "test", "ood"):
        found[name] = logits_of(model, study.sets[name].sequences, model.mean_draw())
    model.detach()
    return found, {"passes": 1, "additional_parameters": 0, "stochastic_parameters": 0}


def _lora(study: Study, run: Run, folder: Path) -> Result:
    with lora(study, 0.0, run.seed) as made:
        fit(made, run.rows, run.training)
        found = {name: made.logits_of(name) for name in ("validation", "test", "ood")}
        return found, {"passes": 1, "additional_parameters": _trainable(made.model), "stochastic_parameters": 0}


def _dropout(study: Study, run: Run, folder: Path) -> Result:
    with lora(study, DROPOUT, run.seed) as made:
        fit(made, run.rows, run.training)
        found = {name: made.logits_of(name, NUM_SAMPLES, dropout=True, seed=run.seed) for name in ("test", "ood")}
        count = _trainable(made.model)
        return found, {"passes": NUM_SAMPLES, "additional_parameters": count, "stochastic_parameters": 0}


def _trainable(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _scalabl(study: Study, run: Run, folder: Path) -> Result:
    config = study.config.model_copy(update={"prior_std": run.prior_std})
    metrics = train_adapter(
        study.pretrained.model,
        config,
        run.training,
        study.sets[run.rows],
        study.sets["validation"],
        folder,
        caches=(study.caches[run.rows], study.caches["validation"]),
    )
    model = load_adapter(study.pretrained.model, folder)
    mean, log_std = (tensor.detach() for tensor in model.posterior())
    notes: dict[str, Any] = {
        "passes": NUM_SAMPLES,
        "additional_parameters": metrics["additional_parameters"],
        "stochastic_parameters": metrics["stochastic_parameters"],
        "median_sigma": float(log_std.exp().median()),
        "median_abs_mu": float(mean.abs().median()),
        "median_ratio": float((log_std.exp() / mean.abs()).median()),
    }
    try:
        if run.report == "validation":
            return {name: sampled(study, model, name) for name in ("validation", "ood_validation")}, notes
        found = {name: sampled(study, model, name) for name in ("test", "ood")}
        if not run.recipe:  # ours: scale and temperature on half of the validation rows, thresholds on the other
            notes |= _fit(study, model, found)
        return found, notes
    finally:
        model.detach()


def sampled(study: Study, model: ScalaBLModel, name: str, scale: float = 1.0, rows: Tensor | None = None) -> Tensor:
    """[N, K, C] of a set, or of some of its rows, with sigma scaled."""
    draws = model.draws(NUM_SAMPLES)
    draws = dataclasses.replace(draws, epsilon=scale * draws.epsilon)
    cache, encoded = study.caches[name], study.sets[name]
    rows = torch.arange(len(encoded.answers)) if rows is None else rows
    chosen = subset(encoded, rows)
    return logits_of(model, chosen.sequences, draws, states=lambda index, width: cache.of(rows[index], width))


def _fit(study: Study, model: ScalaBLModel, found: dict[str, Tensor]) -> dict[str, Any]:
    """Adds the logits at the fitted scale to `found`."""
    rows = study.fit_rows
    answers = study.sets["validation"].answers[rows]
    fitted = fit_scale(lambda scale: sampled(study, model, "validation", scale, rows), answers)
    scale = fitted.best.posterior_scale
    found["fit"] = fitted.logits
    found["thresholds"] = sampled(study, model, "validation", scale, study.threshold_rows)
    for name in ("test", "ood"):
        found[f"{name}_scaled"] = found[name] if scale == 1 else sampled(study, model, name, scale)
    return {
        "posterior_scale": scale,
        "temperature": fitted.best.temperature,
        "trials": [dataclasses.asdict(trial) for trial in fitted.trials],
    }


def keep_ensemble(study: Study, rows: str) -> None:
    """The three plain LoRAs of some rows as one ensemble, once all have left their logits here."""
    name, paths = f"{rows}-ensemble", [study.folder / f"{rows}-lora-{seed}" / "logits.safetensors" for seed in SEEDS]
    if scores_of(name) is None and all(path.is_file() for path in paths):
        one = scores_of(f"{rows}-lora-{SEEDS[0]}") or {}
        count = len(SEEDS) * one["additional_parameters"]
        notes = {"passes": len(SEEDS), "additional_parameters": count, "stochastic_parameters": 0}
        keep(name, notes | {"scores": ensemble(study, [load_file(path) for path in paths])})
