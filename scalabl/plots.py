"""Figures of what was measured, drawn with matplotlib (the `plots` extra) and without a display."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from scalabl.calibration import Outcome


def save_fit(outcome: Outcome, path: Path) -> None:
    """The fit of a calibration: NLL over posterior scale, with the best temperature and with none, and that temperature."""
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
    figure.savefig(path, dpi=120)
