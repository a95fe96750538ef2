"""Figures of calibrations and evaluations, drawn with matplotlib (the `plots` extra); no display is needed.

The numbers are computed in `calibration` and `report`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from scalabl.evaluation.calibration import Outcome
from scalabl.evaluation.report import Evaluated, reliability
from scalabl.evaluation.scoring import BINS
from scalabl.uncertainty.selective import doubts, risk_coverage

DOUBT_COLOURS = {"mutual_information": "tab:blue", "entropy": "tab:orange", "confidence": "tab:green"}
DOUBT_NAMES = {"mutual_information": "mutual information", "entropy": "entropy", "confidence": "1 − confidence"}


def save_fit(outcome: Outcome, path: Path) -> None:
    """Save the figure of a calibration's fit: NLL by posterior scale at T = 1 and at the best T, and the best T."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    scales = [trial.posterior_scale for trial in outcome.trials]
    left.plot(scales, [trial.nll_untempered for trial in outcome.trials], "o--", color="tab:grey", label="T = 1")
    left.plot(scales, [trial.nll for trial in outcome.trials], "o-", color="tab:blue", label="best T")
    left.set(xlabel="posterior scale τ", ylabel="NLL on the fit rows (nats)")
    left.legend()
    right.plot(scales, [trial.temperature for trial in outcome.trials], "o-", color="tab:blue")
    right.set(xlabel="posterior scale τ", ylabel="best temperature T")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.axvline(outcome.posterior_scale, color="tab:red", linewidth=1)
        axes.grid(alpha=0.3)
    data = outcome.calibration.data
    figure.suptitle(
        f"{data.name}: τ = {outcome.posterior_scale:.2f}, T = {outcome.temperature:.2f} ({data.fit_rows} fit rows)",
        fontsize=11,
    )
    _save(figure, path)


def save_evaluation(inside: Evaluated, outside: list[Evaluated], folder: Path) -> None:
    """Save `reliability.png`, `risk_coverage.png` and `mutual_information.png` of an evaluation; creates the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    _save(_reliability(inside), folder / "reliability.png")
    _save(_risk_coverage(inside), folder / "risk_coverage.png")
    _save(_mutual_information(inside, outside), folder / "mutual_information.png")


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=120)


def _reliability(inside: Evaluated) -> Figure:
    """Accuracy by confidence; below it the number of inputs in each bin."""
    bins = reliability(inside.outcome, inside.answers)
    middles = [(bin_["low"] + bin_["high"]) / 2 for bin_ in bins]
    figure = Figure(figsize=(5, 5.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    top.bar(middles, [bin_["accuracy"] for bin_ in bins], width=0.9 / BINS, color="tab:blue", alpha=0.7)
    confidence, accuracy = ([bin_[name] for bin_ in bins] for name in ("confidence", "accuracy"))
    top.plot(confidence, accuracy, "o", color="black", markersize=3)
    top.plot([0, 1], [0, 1], "--", color="tab:grey")
    top.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy", title=f"{inside.name}, {len(inside)} inputs")
    bars = bottom.bar(middles, [bin_["count"] for bin_ in bins], width=0.9 / BINS, color="tab:grey")
    bottom.bar_label(bars, fontsize=7)
    bottom.set(xlabel="confidence", ylabel="inputs", yscale="log", ylim=(0.8, 5 * len(inside)))
    return figure


def _risk_coverage(inside: Evaluated) -> Figure:
    """Share of wrong answers by share of inputs answered, for each doubt score and for an ideal one."""
    wrong = inside.outcome.probabilities.argmax(-1) != inside.answers
    share = torch.arange(1, len(inside) + 1) / len(inside)
    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.subplots()
    for name, doubt in doubts(inside.outcome).items():
        curve = risk_coverage(doubt, wrong)
        label = f"{DOUBT_NAMES[name]} ({curve.mean():.4f})"
        axes.plot(share, curve, color=DOUBT_COLOURS[name], label=label)
    ideal = wrong.double().sort().values.cumsum(0) / torch.arange(1, len(wrong) + 1)
    axes.plot(share, ideal, ":", color="black", label=f"the ideal ({ideal.mean():.4f})")
    axes.set(xlabel="share of inputs answered", ylabel="share of answers wrong", xlim=(0, 1), title=inside.name)
    axes.set_ylim(bottom=0)
    axes.legend(title="doubt score (area)", fontsize=8)
    axes.grid(alpha=0.3)
    return figure


def _mutual_information(inside: Evaluated, outside: list[Evaluated]) -> Figure:
    """Histograms of mutual information: right answers, wrong answers, and inputs outside the choices."""
    wrong = inside.outcome.probabilities.argmax(-1) != inside.answers
    values = inside.outcome.mutual_information
    groups = {f"right ({int((~wrong).sum())})": values[~wrong], f"wrong ({int(wrong.sum())})": values[wrong]}
    groups |= {f"{evaluated.name} ({len(evaluated)})": evaluated.outcome.mutual_information for evaluated in outside}
    edges = np.geomspace(1e-6, 3, 40).tolist()
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for label, group in groups.items():
        if len(group):
            weights = np.full(len(group), 1 / len(group))
            axes.hist(group.clamp(1e-6, 3).numpy(), bins=edges, weights=weights, histtype="step", linewidth=1.5, label=label)
    axes.set(xscale="log", xlabel="mutual information (nats)", ylabel="share of inputs", title=inside.name)
    axes.legend(fontsize=8)
    return figure
