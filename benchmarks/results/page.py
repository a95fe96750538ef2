"""docs/results.md and its figures, from the scores of the runs; what has not run is said to be missing.

Nothing is measured here.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.results.fitted import section
from benchmarks.results.plan import SEEDS, STEPS, sweep_runs
from benchmarks.results.precision import SCALES
from benchmarks.results.saved import scores_of
from benchmarks.results.study import ADAPTED_LAYERS, FEW, NUM_SAMPLES, RANK

ROOT = Path(__file__).parents[2] / "docs"
FIGURES = ROOT / "results"

COLUMNS = {
    "accuracy": "ACC",
    "nll": "NLL",
    "ece": "ECE",
    "brier": "Brier",
    "auroc_wrong_entropy": "AUROC wrong",
    "auroc_ood_entropy": "OOD by entropy",
    "auroc_ood_mutual_information": "OOD by MI",
}
THRESHOLD_ROWS, TEST_ROWS = 250, 1000
OURS, ENSEMBLE = "ScalaBL, ours + τ, T", "ensemble of three LoRAs"
# label -> (run without its seed, variant, passes); a run without seeds stands alone.
METHODS: tuple[tuple[str, str, str], ...] = (
    ("zero-shot base", "base", "plain"),
    ("LoRA (MLE)", "{rows}-lora", "plain"),
    ("LoRA + temperature", "{rows}-lora", "tempered"),
    ("LoRA, MC dropout", "{rows}-dropout", "plain"),
    (ENSEMBLE, "{rows}-ensemble", "plain"),
    ("ScalaBL, published recipe", "{rows}-published", "plain"),
    ("ScalaBL, ours", "{rows}-scalabl", "plain"),
    (OURS, "{rows}-scalabl", "calibrated"),
)


def write() -> None:
    """Write the page."""
    FIGURES.mkdir(parents=True, exist_ok=True)
    parts = [
        _intro(),
        "## All 3,000 training rows\n",
        _table("train"),
        f"## {FEW} training rows\n",
        _table("few"),
        section(),
        _conformal(),
        _sweep(),
        _precision(),
    ]
    (ROOT / "results.md").write_text("\n".join(parts).rstrip() + "\n", encoding="utf-8")


def _intro() -> str:
    one = scores_of(f"train-scalabl-{SEEDS[0]}") or {}
    return f"""# Results

Made by `python -m benchmarks.results` (see its `--help`) from the scores in `benchmarks/results/runs`; every number is of a run
of that command. Nothing here is chosen after the fact: a number that looks bad stays.

**Task.** CLINC150 in ten domains (clinc10: 3,000 training, 500 validation, 1,000 test queries; S. Larson et al., EMNLP 2019, CC BY 3.0)
and 1,000 queries outside all of them (clinc_oos) as OOD set, which no training and no calibration saw. **Base.** SmolLM2-135M-Instruct.
**Every adapter**: rank {RANK}, all linear modules of the last {ADAPTED_LAYERS} of 30 layers and the head, batches of 16, AdamW at 2e-3,
{STEPS["train"]} steps ({STEPS["few"]} with few rows), the weights of the best of four validations. The peers are trained by PEFT on the same rows in
the same order. Sampled methods use K = {NUM_SAMPLES}. Temperature, and scale τ with temperature, are fitted on the same 250 of the validation
rows. AUROC wrong: wrong answers found by entropy. ± is one standard deviation over seeds.

Machine of the runs: {one.get("machine", "not run yet")}.
"""


def _table(rows: str) -> str:
    lines = [
        "| method | seeds | " + " | ".join(COLUMNS.values()) + " | parameters (random) | passes |",
        "|---|---|" + "---|" * (len(COLUMNS) + 2),
    ]
    for label, run, variant in METHODS:
        runs = _runs(run.format(rows=rows))
        if not runs:
            lines.append(f"| {label} | not run yet |" + " |" * (len(COLUMNS) + 2))
            continue
        cells = [_mean_sd([one["scores"][variant].get(name, math.nan) for one in runs], name) for name in COLUMNS]
        first = runs[0]
        parameters = f"{first['additional_parameters']:,} ({first['stochastic_parameters']:,})"
        lines.append(f"| {label} | {len(runs)} | " + " | ".join(cells) + f" | {parameters} | {first['passes']} |")
    notes = [
        f"seed {seed}: τ = {one['posterior_scale']:.2f}, T = {one['temperature']:.2f}, "
        f"median σ {one['median_sigma']:.3f} beside a median |μ| of {one['median_abs_mu']:.2f}"
        for seed in SEEDS
        if (one := scores_of(f"{rows}-scalabl-{seed}"))
    ]
    return "\n".join(lines) + ("\n\nOurs: " + "; ".join(notes) + ".\n" if notes else "\n") + _against_the_best(rows)


def _against_the_best(rows: str) -> str:
    """What was aimed at, and what came of it: ours, calibrated, beside the best of the other methods."""
    scores = {
        label: [one["scores"][variant] for one in _runs(run.format(rows=rows))]
        for label, run, variant in METHODS
        if "ours" not in label or label == OURS
    }
    ours = scores.pop(OURS)
    others = {label: seeds for label, seeds in scores.items() if seeds}
    if not ours or not others:
        return ""
    lines = [f"\n**{OURS}, against what was aimed at.**\n"]
    for name, aim in (
        ("nll", "best or within a standard error"),
        ("ece", "best or within a standard error, and at most 0.02"),
    ):
        best, gap, error = _lowest(ours, others, name)
        holds = gap <= error and (name == "nll" or _mean(ours, name) <= 0.02)
        single = {label: seeds for label, seeds in others.items() if label != ENSEMBLE}
        of_one = _lowest(ours, single, name)
        lines.append(
            f"* {COLUMNS[name]} {aim}: **{'holds' if holds else 'missed'}**: {_mean(ours, name):.4f}; the best of the others is "
            f"{best} with {_mean(others[best], name):.4f}, a difference of {gap:+.4f} with a standard error of {error:.4f}. Of the "
            f"single adapters it is {of_one[0]}: {of_one[1]:+.4f}, standard error {of_one[2]:.4f}."
        )
    label, best = max(others.items(), key=lambda item: _mean(item[1], "accuracy"))
    gap = _mean(ours, "accuracy") - _mean(best, "accuracy")
    lines.append(
        f"* Accuracy within a point of the best: **{'holds' if gap >= -0.01 else 'missed'}**: {gap:+.4f} to {label}."
    )
    ood, score = max((_mean(ours, f"auroc_ood_{name}"), name) for name in ("entropy", "mutual_information", "confidence"))
    holds, doubt = ood >= 0.9, score.replace("_", " ").replace("confidence", "1 − confidence")
    lines.append(
        f"* OOD AUROC of at least 0.90 by the best single score: **{'holds' if holds else 'missed'}**: {ood:.3f} by {doubt}."
    )
    return "\n".join(lines) + "\n"


def _lowest(
    ours: Sequence[dict[str, float]], others: dict[str, list[dict[str, float]]], name: str
) -> tuple[str, float, float]:
    """The method with the lowest score, by how much ours is above it, and the standard error of that."""
    label, best = min(others.items(), key=lambda item: _mean(item[1], name))
    error = math.hypot(_standard_error(ours, name), _standard_error(best, name))
    return label, _mean(ours, name) - _mean(best, name), error


def _mean(seeds: Sequence[dict[str, float]], name: str) -> float:
    return statistics.mean(scores[name] for scores in seeds)


def _standard_error(seeds: Sequence[dict[str, float]], name: str) -> float:
    """Of the mean over seeds; 0 of a single run, whose spread nobody knows."""
    return statistics.stdev(scores[name] for scores in seeds) / math.sqrt(len(seeds)) if len(seeds) > 1 else 0.0


def _runs(run: str) -> list[dict[str, Any]]:
    """The finished runs of a name, one for each seed."""
    if (alone := scores_of(run)) is not None:
        return [alone]
    return [one for seed in SEEDS if (one := scores_of(f"{run}-{seed}")) is not None]


def _mean_sd(values: Sequence[float], name: str) -> str:
    if any(map(math.isnan, values)):
        return "–"
    digits = 3 if name in ("accuracy", "auroc_wrong_entropy") or name.startswith("auroc") else 4
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def _conformal() -> str:
    lines = [
        "## Prediction sets\n",
        "Split-conformal thresholds from the 250 validation rows that τ and T did not see; coverage on the test set. `rule` is the conformal",
        "rule alone, which the theory is about; `served` always has the top choice in. ± over runs, which share their rows; `chance` is one",
        "standard deviation of what coverage comes to with so many threshold rows and test queries, whatever the method: the aim of two points",
        "is within it at 80% and 90%.\n",
        "| rows | method | level | coverage (rule) | off by | chance | coverage (served) | set size | set size outside |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for rows in ("train", "few"):
        by_seed = [one["scores"]["conformal"] for one in _runs(f"{rows}-scalabl")]
        for cells in zip(*by_seed, strict=True):
            first = cells[0]
            values = [
                _mean_sd([cell[name] for cell in cells], "accuracy")
                for name in ("coverage_of_rule", "coverage_as_served", "size", "size_outside")
            ]
            off = statistics.mean(cell["coverage_of_rule"] for cell in cells) - first["level"]
            chance = math.sqrt(first["level"] * (1 - first["level"]) * (1 / THRESHOLD_ROWS + 1 / TEST_ROWS))
            values[1:1] = [f"{off:+.1%}", f"{chance:.1%}"]
            lines.append(f"| {rows} | {first['method'].upper()} | {first['level']:.0%} | " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"


def _sweep() -> str:
    lines = [
        "## KL direction, β and sigma\n",
        "One seed, all rows, judged on the validation rows (500) and their OOD rows (100), before τ and T.\n",
        "| recipe | median σ | median σ/|μ| | ACC | NLL | ECE | mean MI | mean MI outside | OOD by entropy | OOD by MI |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in sweep_runs():
        one = scores_of(run.name)
        label = run.name.removeprefix("sweep ")
        if one is None:
            lines.append(f"| {label} | not run yet |" + " |" * 8)
            continue
        score = one["scores"]["plain"]
        names = (
            "accuracy",
            "nll",
            "ece",
            "mutual_information",
            "ood_mutual_information",
            "auroc_ood_entropy",
            "auroc_ood_mutual_information",
        )
        values = [f"{score[name]:.3f}" if name.startswith(("acc", "auroc")) else f"{score[name]:.4f}" for name in names]
        lines.append(f"| {label} | {one['median_sigma']:.3f} | {one['median_ratio']:.2f} | " + " | ".join(values) + " |")
    return "\n".join(lines).replace("σ/|μ|", "σ/\\|μ\\|") + "\n" + _of_the_sweep()


def _of_the_sweep() -> str:
    """Which cells were best, and that the defaults follow."""
    cells = {run.name.removeprefix("sweep "): one for run in sweep_runs() if (one := scores_of(run.name))}
    if not cells:
        return ""
    best = {name: min(cells, key=lambda cell: cells[cell]["scores"]["plain"][name]) for name in ("nll", "ece")}
    return (
        f'\nThe lowest NLL is that of "{best["nll"]}", the lowest ECE that of "{best["ece"]}"; `q_p, β = 1` is what '
        "`scalabl train` does unless told otherwise.\n"
    )


def _precision() -> str:
    times = scores_of("precision times")
    text = [
        "## Precision for cost\n",
        "RMS error of probabilities and of mutual information (nats) against a reference of antithetic samples; half of the inputs are from",
        "outside the choices. Samples come from one sequence of 256 in blocks of K.\n",
    ]
    for scale in SCALES:
        measured = scores_of(f"precision x{scale:g}")
        title = "sigma as trained" if scale == 1 else f"sigma times {scale:g}"
        if measured is None:
            text.append(f"With {title}: not run yet.\n")
            continue
        text += [
            f"### With {title} (median τσ/|μ| = {measured['relative_spread']:.2f}), {SCALES[scale][0]} inputs, {SCALES[scale][1]:,} samples as reference\n",
            "| method | K | error of probabilities | error of MI | bias of MI | seconds per input |",
            "|---|---|---|---|---|---|",
        ]
        points: dict[str, list[tuple[float, float, int]]] = {}
        for row in measured["rows"]:
            seconds = _seconds(times, row["method"], row["num_samples"])
            text.append(
                f"| {row['method']} | {row['num_samples'] or '–'} | {row['probabilities']:.5f} | {row['mutual_information']:.5f} "
                f"| {row['mutual_information_bias']:+.5f} | {'not timed yet' if seconds is None else f'{seconds:.4f}'} |"
            )
            if seconds is not None:
                points.setdefault(row["method"], []).append((seconds, row["probabilities"], row["num_samples"]))
        if points:
            _pareto(points, FIGURES / f"precision-x{scale:g}.png", title)
            text.append(f"\n![Error against time](results/precision-x{scale:g}.png)\n")
    if times is not None:
        text.append(f"Times: {times['threads']} thread, medians of interleaved rounds; {times['machine']}.")
    return "\n".join(text) + "\n"


def _seconds(times: dict[str, Any] | None, method: str, count: int) -> float | None:
    """A control variate costs its samples and the linearisation."""
    if times is None:
        return None
    seconds: dict[str, float] = times["seconds"]
    if method == "linearised":
        return seconds["linearised"]
    sampled = seconds.get(f"MC {count}")
    return sampled if sampled is None or "control" not in method else sampled + seconds["linearised"]


def _pareto(points: dict[str, list[tuple[float, float, int]]], path: Path, title: str) -> None:
    figure = Figure(figsize=(6.5, 4.5), layout="constrained")
    axes = figure.subplots()
    for method, pairs in points.items():
        style = "*" if method == "linearised" else "o-"
        axes.plot([p[0] for p in pairs], [p[1] for p in pairs], style, label=method, markersize=12 if style == "*" else 4)
    axes.set(xscale="log", yscale="log", xlabel="seconds per input", ylabel="RMS error of probabilities", title=title)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=120)
