"""Posteriors of finished LoRAs: what `scalabl fit` makes of the study's plain LoRAs, beside their own answers.

Each LoRA is trained by PEFT (`finished`), fitted by the command, and compared on the same test queries: NLL and ECE with a
temperature from the same rows, OOD detection by mutual information, and the command's time.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import describe
from benchmarks.results.execute import sampled
from benchmarks.results.finished import SETS, own_logits, train, training_rows
from benchmarks.results.paired import paired_differences
from benchmarks.results.plan import SEEDS, Run, peer_runs
from benchmarks.results.saved import read_logits, save_logits, save_scores, scores_of
from benchmarks.results.scores import best_temperature, score
from benchmarks.results.study import NUM_SAMPLES, TEMPLATE, Study, subset
from scalabl.files.adapter_directory import load_adapter, read_config
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.model.token_batch import TokenBatch
from scalabl.passes.batches import batches
from scalabl.uncertainty.linearized import NEGLIGIBLE, linearize
from scalabl.uncertainty.predictive import predictive

LINEARIZED_SAMPLES = 512
METHODS = {"monte_carlo": f"fitted, {NUM_SAMPLES} samples", "linearized": "fitted, linearised"}


def lora_runs(rows: str) -> list[Run]:
    """The plain LoRAs of some rows."""
    return [run for run in peer_runs() if (run.method, run.rows) == ("lora", rows)]


def measure(study: Study, data: Path, run: Run) -> None:
    """Train, fit and score one LoRA, unless its scores are there."""
    name, made_from = f"{run.name}-fitted", study.made_from(run, fit=True)
    if scores_of(name, made_from) is not None:
        return
    folder = study.folder / run.name
    folder.mkdir(exist_ok=True)
    lora = train(study, run)
    rows = training_rows(study, data, run.rows)
    began = time.perf_counter()
    _fit(study, lora, rows, folder / "fitted")
    seconds = time.perf_counter() - began
    model = load_adapter(study.pretrained.model, folder / "fitted")
    try:
        logits = _logits(study, model)
    finally:
        model.detach()
    save_logits(folder / "fitted.safetensors", logits, made_from)
    record = read_config(folder / "fitted").posterior_fit
    assert record is not None
    notes: dict[str, Any] = {"fit": record.model_dump(mode="json"), "seconds": seconds, "machine": describe()}
    save_scores(name, notes | {"scores": _scores(study, run, logits)}, made_from)


def _fit(study: Study, lora: Path, rows: Path, output: Path) -> None:
    base = study.pretrained.model.config._name_or_path
    options = ["--model", base, "--template", TEMPLATE, "--output", str(output), "--device", "cpu"]
    command = [sys.executable, "-m", "scalabl_server.cli", "fit", str(lora), "--data", str(rows), *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def _logits(study: Study, model: ScalaBLModel) -> dict[str, Tensor]:
    """Logits [N, K, C] by samples, and by samples of the linearised model; of the validation rows only those to fit."""
    logits = {}
    for name in SETS:
        rows = study.fit_rows if name == "validation" else torch.arange(len(study.sets[name].answers))
        logits[f"monte_carlo {name}"] = sampled(study, model, name, rows=rows)
        sequences = subset(study.sets[name], rows).sequences
        linear = torch.empty(len(sequences), LINEARIZED_SAMPLES, model.num_choices)
        for batch in batches([len(ids) for ids in sequences], model.num_choices, 4096):
            tokens = TokenBatch.of([sequences[i] for i in batch])
            states = study.caches[name].of(rows[batch], tokens.input_ids.shape[1])
            linearization = linearize(model, tokens, negligible=NEGLIGIBLE, states=states)
            linear[batch] = linearization.samples(LINEARIZED_SAMPLES).float()
        logits[f"linearized {name}"] = linear
    return logits


def _scores(study: Study, run: Run, logits: dict[str, Tensor]) -> dict[str, Any]:
    """By method: the scores without and with a temperature, and with it the differences to the LoRA with its own."""
    answers = study.sets["validation"].answers[study.fit_rows]
    lora = own_logits(study, run)
    own = best_temperature(lora["validation"][study.fit_rows], answers)
    scores: dict[str, Any] = {"lora": score(study, lora["test"], lora["ood"], own, ("test", "ood")) | {"temperature": own}}
    for method in METHODS:
        validation, test, ood = (logits[f"{method} {name}"] for name in SETS)
        temperature = best_temperature(validation, answers)
        scores[method] = {
            "plain": score(study, test, ood, 1.0, ("test", "ood")),
            "tempered": score(study, test, ood, temperature, ("test", "ood")) | {"temperature": temperature},
        }
    return scores


def compare(study: Study, rows: str) -> None:
    """Save the paired differences of fitted LoRAs to the same LoRAs, each with a temperature, over all seeds together."""
    runs = lora_runs(rows)
    name, made_from = f"{rows}-fitted-differences", study.made_from(runs=[run.plan for run in runs])
    answers = study.sets["test"].answers
    differences: dict[str, Any] = {}
    for method in METHODS:
        pairs = []
        for run in runs:
            saved = scores_of(f"{run.name}-fitted", study.made_from(run, fit=True))
            if saved is None:
                return
            logits = read_logits(study.folder / run.name / "fitted.safetensors", study.made_from(run, fit=True))
            before, after = (saved["scores"][key] for key in ("lora", method))
            pairs.append(
                (
                    predictive(own_logits(study, run)["test"], before["temperature"]),
                    predictive(logits[f"{method} test"], after["tempered"]["temperature"]),
                )
            )
        differences[method] = paired_differences(pairs, answers)
    save_scores(name, {"differences": differences}, made_from)


def measure_all(study: Study, data: Path, seeds: list[int] | None = None) -> None:
    """Every LoRA, then the differences."""
    for rows in ("few", "train"):
        for run in lora_runs(rows):
            if seeds is None or run.seed in seeds:
                measure(study, data, run)
        compare(study, rows)


def section() -> str:
    """The part of the page about this."""
    lines = [
        "## Posteriors of finished LoRAs\n",
        "The study's plain LoRAs as PEFT saves them, given a posterior by `scalabl fit` with its defaults (full covariance,",
        "prior precision 1 in units of the means, at most 1,000 training rows), without training. T is fitted on the same",
        "250 validation rows for each line.\n",
        "| rows | method | seeds | T | ACC | NLL | ECE | OOD by entropy | OOD by MI |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for rows in ("train", "few"):
        found = [one for seed in SEEDS if (one := scores_of(f"{rows}-lora-{seed}-fitted")) is not None]
        if not found:
            lines.append(f"| {rows} | not run yet |" + " |" * 7)
            continue
        lines.append(_line(rows, "LoRA + temperature", [one["scores"]["lora"] for one in found]))
        for method, label in METHODS.items():
            lines.append(_line(rows, label, [one["scores"][method]["plain"] for one in found]))
            lines.append(_line(rows, f"{label} + temperature", [one["scores"][method]["tempered"] for one in found]))
        trained = [one["scores"]["plain"] for seed in SEEDS if (one := scores_of(f"{rows}-scalabl-{seed}")) is not None]
        lines.append(_line(rows, "ScalaBL, ours (variational)", trained))
    return "\n".join([*lines, "", *_sentences()]) + "\n"


def _line(rows: str, label: str, scores: list[dict[str, float]]) -> str:
    if not scores:
        return f"| {rows} | {label} | not run yet |" + " |" * 6
    names = ("temperature", "accuracy", "nll", "ece", "auroc_ood_entropy", "auroc_ood_mutual_information")
    cells = [
        f"{sum(one.get(name, 1.0) for one in scores) / len(scores):.{4 if name in ('nll', 'ece') else 3}f}" for name in names
    ]
    if label.startswith("LoRA"):
        cells[-1] = "–"  # one pass has no mutual information
    return f"| {rows} | {label} | {len(scores)} | " + " | ".join(cells) + " |"


def _sentences() -> list[str]:
    lines = []
    for rows in ("train", "few"):
        one = scores_of(f"{rows}-fitted-differences")
        if one is None:
            continue
        for method, label in METHODS.items():
            parts = [
                f"{name.upper()} {values['difference']:+.4f} ({values['low']:+.4f} to {values['high']:+.4f})"
                for name, values in one["differences"][method].items()
            ]
            lines.append(f"* {rows}, {label}, minus LoRA, both with a temperature: {', '.join(parts)}.")
    if lines:
        lines.append("\nMean over seeds; 95% intervals of a bootstrap that takes the same test queries for both.")
    fits = [one for rows in ("train", "few") for seed in SEEDS if (one := scores_of(f"{rows}-lora-{seed}-fitted"))]
    if fits:
        slowest = max(one["seconds"] for one in fits)
        lines.append(f"The command took at most {slowest:.0f} s, loading included. {fits[0]['machine']}.")
    return lines
