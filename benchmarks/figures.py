"""Figures of `benchmarks.serving`, from the JSON that it leaves, with matplotlib (the `plots` extra)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure


def save_figures(results: dict[str, Any], folder: Path) -> list[Path]:
    """One PNG for each part that was measured."""
    drawn = {
        "brute": _brute,
        "trunk": partial(_ratios, without="the shared trunk"),
        "prefix": partial(_ratios, without="the prefix cache"),
        "memory": _memory,
        "load": _load,
    }
    saved = []
    for part, draw in drawn.items():
        if rows := results.get(part):
            path = folder / f"serving-{part}.png"
            draw(rows).savefig(path, dpi=120)
            saved.append(path)
    return saved


def _brute(rows: Sequence[dict[str, Any]]) -> Figure:
    """Seconds per input against K, a panel for each length, a line for each method."""
    kinds = list(dict.fromkeys(row["prompts"] for row in rows))
    figure = Figure(figsize=(4.2 * len(kinds), 4.2), layout="constrained")
    for axes, kind in zip(_panels(figure, len(kinds)), kinds, strict=True):
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
    for axes, kind in zip(_panels(figure, len(kinds)), kinds, strict=True):
        for method in dict.fromkeys(row["method"] for row in rows):
            chosen = [row for row in rows if (row["prompts"], row["method"]) == (kind, method)]
            held = statistics.median(row["held_mib"] for row in chosen)
            label = f"{method} (holds {held:.0f} MiB)"
            axes.plot([row["num_samples"] for row in chosen], [row["pass_mib"] for row in chosen], "o-", label=label)
        axes.set(xscale="log", yscale="log", xlabel="posterior samples K", ylabel="MiB of a pass", title=f"{kind} prompts")
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3, which="both")
    return figure


def _load(found: dict[str, Any]) -> Figure:
    """Latency and answers in time against offered load, and the memory of the soak; a panel for each that was measured."""
    levels, soak = found.get("levels", []), found.get("soak")
    count = 2 * bool(levels) + bool(soak)
    figure = Figure(figsize=(4.6 * max(1, count), 3.8), layout="constrained")
    panels = iter(_panels(figure, max(1, count)))
    if levels:
        axes, shares = next(panels), [row["share"] for row in levels]
        for name in ("median", "p95", "p99"):
            axes.plot(shares, [1000 * row["seconds"][name] for row in levels], "o-", label=name, markersize=4)
        axes.set(xlabel="offered load, % of saturation", ylabel="latency from when it was due (ms)", yscale="log")
        axes.legend(fontsize=8)
        axes = next(panels)
        offered = [row["offered"] for row in levels]
        axes.plot(offered, offered, "--", color="tab:grey", label="offered")
        axes.plot(offered, [row["goodput"] for row in levels], "o-", label="answered in time", markersize=4)
        axes.set(xlabel="offered requests per second", ylabel="requests per second")
        axes.legend(fontsize=8)
    if soak:
        axes = next(panels)
        memory = [rss / 2**20 for _, rss in soak["rss"]]
        axes.plot([at / 1000 for at, _ in soak["rss"]], memory, "o-", markersize=3)
        axes.set(xlabel="thousands of requests answered", ylabel="resident memory (MiB)", ylim=(0, 1.2 * max(memory)))
    for axes in figure.axes:
        axes.grid(alpha=0.3)
    return figure


def _panels(figure: Figure, count: int) -> list[Axes]:
    return list(figure.subplots(1, count, squeeze=False)[0])
