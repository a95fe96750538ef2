"""The figure of the load benchmark, drawn from its numbers with matplotlib (the `plots` extra)."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure


def load_figure(results: dict[str, Any]) -> Figure:
    """Latency and answers in time against offered load, and the memory of the soak; a panel for each that was measured."""
    levels, soak = results.get("levels", []), results.get("soak")
    count = 2 * bool(levels) + bool(soak)
    figure = Figure(figsize=(4.6 * max(1, count), 3.8), layout="constrained")
    panels = iter(figure.subplots(1, max(1, count), squeeze=False)[0])
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
