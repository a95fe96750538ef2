"""Carrying out the trainings of the study. Adapter and logits go to the study's folder, scores to `saved`."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import describe
from benchmarks.results.lora import fit, lora
from benchmarks.results.plan import SEEDS, Run, peer_runs
from benchmarks.results.saved import read_logits, save_logits, save_scores, scores_of
from benchmarks.results.scores import ensemble, scores_by_variant
from benchmarks.results.study import NUM_SAMPLES, Study, subset
from scalabl.evaluation.calibration_fit import fit_scale
from scalabl.evaluation.inference import logits_of
from scalabl.files.adapter_directory import load_adapter
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.training.trainer import train_adapter

DROPOUT = 0.1


def execute(study: Study, run: Run) -> None:
    """Train, evaluate and save the scores."""
    folder = study.folder / run.name
    folder.mkdir(exist_ok=True)
    made_from = study.made_from(run)  # before anything is attached to the base model
    began = time.perf_counter()
    logits, notes = {"base": _base, "lora": _lora, "dropout": _dropout, "scalabl": _scalabl}[run.method](study, run, folder)
    save_logits(folder / "logits.safetensors", logits, made_from)
    notes |= {"seconds": round(time.perf_counter() - began), "machine": describe()}
    save_scores(run.name, notes | {"scores": scores_by_variant(study, run, logits, notes)}, made_from)


Result = tuple[dict[str, Tensor], dict[str, Any]]


def _base(study: Study, run: Run, folder: Path) -> Result:
    model = study.model(target_modules=("lm_head",), layers_to_transform=None)  # B = 0: the base model's own logits
    logits = {}
    for name in ("validation", "test", "ood"):
        logits[name] = logits_of(model, study.sets[name].sequences, model.mean_draw())
    model.detach()
    return logits, {"passes": 1, "additional_parameters": 0, "stochastic_parameters": 0}


def _lora(study: Study, run: Run, folder: Path) -> Result:
    with lora(study, 0.0, run.seed) as peer:
        fit(peer, run.rows, run.training)
        logits = {name: peer.logits_of(name) for name in ("validation", "test", "ood")}
        return logits, {"passes": 1, "additional_parameters": _trainable(peer.model), "stochastic_parameters": 0}


def _dropout(study: Study, run: Run, folder: Path) -> Result:
    with lora(study, DROPOUT, run.seed) as peer:
        fit(peer, run.rows, run.training)
        logits = {name: peer.logits_of(name, NUM_SAMPLES, dropout=True, seed=run.seed) for name in ("test", "ood")}
        count = _trainable(peer.model)
        return logits, {"passes": NUM_SAMPLES, "additional_parameters": count, "stochastic_parameters": 0}


def _trainable(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _scalabl(study: Study, run: Run, folder: Path) -> Result:
    config = study.config.model_copy(update={"prior_std": run.prior_std})
    trained = train_adapter(
        study.pretrained.model,
        config,
        run.training,
        study.sets[run.rows],
        study.sets["validation"],
        folder,
        caches=(study.caches[run.rows], study.caches["validation"]),
    )
    model = load_adapter(study.pretrained.model, folder)
    posterior = model.posterior()
    mean, log_std = posterior.mean.detach(), posterior.log_std.detach()
    notes: dict[str, Any] = {
        "passes": NUM_SAMPLES,
        "additional_parameters": trained.metrics["additional_parameters"],
        "stochastic_parameters": trained.metrics["stochastic_parameters"],
        "median_sigma": float(log_std.exp().median()),
        "median_abs_mu": float(mean.abs().median()),
        "median_ratio": float((log_std.exp() / mean.abs()).median()),
    }
    try:
        if run.report == "validation":
            return {name: sampled(study, model, name) for name in ("validation", "ood_validation")}, notes
        logits = {name: sampled(study, model, name) for name in ("test", "ood")}
        if not run.recipe:  # ours: scale and temperature on half of the validation rows, thresholds on the other
            notes |= _fit(study, model, logits)
        return logits, notes
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


def _fit(study: Study, model: ScalaBLModel, logits: dict[str, Tensor]) -> dict[str, Any]:
    """Adds the logits at the fitted scale to `logits`."""
    rows = study.fit_rows
    answers = study.sets["validation"].answers[rows]
    # The results were measured without the prior that `scalabl calibrate` has.
    fitted = fit_scale(lambda scale: sampled(study, model, "validation", scale, rows), answers, with_prior=False)
    scale = fitted.best.posterior_scale
    logits["fit"] = fitted.logits
    logits["thresholds"] = sampled(study, model, "validation", scale, study.threshold_rows)
    for name in ("test", "ood"):
        logits[f"{name}_scaled"] = logits[name] if scale == 1 else sampled(study, model, name, scale)
    return {
        "posterior_scale": scale,
        "temperature": fitted.best.temperature,
        "trials": [dataclasses.asdict(trial) for trial in fitted.trials],
    }


def save_ensemble(study: Study, rows: str) -> None:
    """The three plain LoRAs of some rows as one ensemble, once all have left their logits here."""
    name = f"{rows}-ensemble"
    runs = [run for run in peer_runs() if (run.method, run.rows) == ("lora", rows)]
    made_from = study.made_from(members=[run.plan for run in runs])
    paths = {run.name: study.folder / run.name / "logits.safetensors" for run in runs}
    if scores_of(name, made_from) is None and all(path.is_file() for path in paths.values()):
        first = scores_of(runs[0].name, study.made_from(runs[0])) or {}
        count = len(SEEDS) * first["additional_parameters"]
        notes = {"passes": len(SEEDS), "additional_parameters": count, "stochastic_parameters": 0}
        logits = [read_logits(paths[run.name], study.made_from(run)) for run in runs]
        save_scores(name, notes | {"scores": ensemble(study, logits)}, made_from)
