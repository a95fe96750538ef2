"""The figures of `benchmarks.serving`, drawn from its numbers with matplotlib (the `plots` extra)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.load.figure import load_figure


def save_figures(results: dict[str, Any], folder: Path) -> list[Path]:
    """One PNG for each part that was measured."""
    figures = {
        "brute": _brute,
        "trunk": partial(_ratios, without="the shared trunk"),
        "prefix": partial(_ratios, without="the prefix cache"),
        "memory": _memory,
        "load": load_figure,
    }
    saved = []
    for part, draw in figures.items():
        if rows := results.get(part):
            path = folder / f"serving-{part}.png"
            draw(rows).savefig(path, dpi=120)
            saved.append(path)
    return saved


def _brute(rows: Sequence[dict[str, Any]]) -> Figure:
    """Seconds per input against K, a panel for each length, a line for each method."""
    kinds = list(dict.fromkeys(row["prompts"] for row in rows))
    figure = Figure(figsize=(4.2 * len(kinds), 4.2), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        of_kind = [row for row in rows if row["prompts"] == kind]
        for name in of_kind[0]["methods"]:
            counts = [row["num_samples"] for row in of_kind]
            axes.plot(counts, [row["methods"][name]["seconds_per_input"] for row in of_kind], "o-", label=name, markersize=4)
        axes.set(
            xscale="log", yscale="log", xlabel="posterior samples K", ylabel="seconds per input", title=f"{kind} prompts"
        )
        axes.grid(alpha=0.3, which="both")
    figure.axes[0].legend(fontsize=8)
    return figure


def _ratios(rows: Sequence[dict[str, Any]], *, without: str) -> Figure:
    """Speed with something over that without it, with the range over rounds."""
    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.subplots()
    for kind in dict.fromkeys(row["prompts"] for row in rows):
        of_kind = [row for row in rows if row["prompts"] == kind]
        middle = [row["ratio"]["median"] for row in of_kind]
        below = [row["ratio"]["median"] - row["ratio"]["lowest"] for row in of_kind]
        above = [row["ratio"]["highest"] - row["ratio"]["median"] for row in of_kind]
        counts = [row["num_samples"] for row in of_kind]
        axes.errorbar(counts, middle, yerr=[below, above], fmt="o-", capsize=3, label=f"{kind} prompts")
    axes.axhline(1, color="tab:grey", linewidth=1)
    axes.set(xscale="log", xlabel="posterior samples K", ylabel=f"times as fast as without {without}")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return figure


def _memory(rows: Sequence[dict[str, Any]]) -> Figure:
    """MiB of a pass beyond what the process holds, against K."""
    kinds = list(dict.fromkeys(row["prompts"] for row in rows))
    figure = Figure(figsize=(4.2 * len(kinds), 3.8), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            chosen = [row for row in rows if (row["prompts"], row["method"]) == (kind, method)]
            held = statistics.median(row["held_mib"] for row in chosen)
            label = f"{method} (holds {held:.0f} MiB)"
            axes.plot([row["num_samples"] for row in chosen], [row["pass_mib"] for row in chosen], "o-", label=label)
        axes.set(xscale="log", yscale="log", xlabel="posterior samples K", ylabel="MiB of a pass", title=f"{kind} prompts")
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3, which="both")
    return figure
