"""`scalabl calibrate`: fits posterior scale, temperature and thresholds on held-out labels. The fit is in `scalabl`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from scalabl.config import SetMethod
from scalabl.errors import ScalaBLError
from scalabl_server.cli.labelled_data import (
    ROWS_HELP,
    Adapter,
    Device,
    LabelColumn,
    Model,
    NumSamples,
    Precision,
    Seed,
    TextColumn,
    columns_of,
    examples_for,
    load,
    plots_module,
    warn,
)
from scalabl_server.cli.options import LARGEST_SEED, errors_as_messages, split

PLOT_FILES = (".png", ".svg", ".pdf")


def calibrate(
    adapter: Adapter,
    data: Annotated[str, typer.Option(help=f"Labelled rows that were not used in training: {ROWS_HELP}.")],
    model: Model = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    num_samples: NumSamples = 16,
    seed: Seed = 0,
    levels: Annotated[str, typer.Option(help="Comma-separated coverage levels for prediction sets.")] = "0.8,0.9,0.95",
    method: Annotated[SetMethod, typer.Option(help="Kind of prediction sets that the server returns.")] = "lac",
    target_risk: Annotated[
        float,
        typer.Option(min=0.001, max=1, help="Largest acceptable share of wrong answers among inputs without abstention."),
    ] = 0.05,
    risk_confidence: Annotated[
        float, typer.Option(min=0, max=0.999, help="Confidence that the share of wrong answers stays below --target-risk.")
    ] = 0.9,
    abstain: Annotated[bool, typer.Option(help="Fit an abstention threshold.")] = True,
    split_seed: Annotated[
        int,
        typer.Option(
            min=0, max=LARGEST_SEED, help="Seed of the random split into rows for the fit and rows for the thresholds."
        ),
    ] = 0,
    plot: Annotated[Path | None, typer.Option(help="Write a plot of the fit to this file (.png, .svg or .pdf).")] = None,
    device: Device = "auto",
    quantization: Precision = None,
) -> None:
    """Calibrate an adapter on held-out labels and write the result into its configuration.

    Half of the rows, chosen at random, fit the posterior scale and the temperature. The other half sets the thresholds for
    prediction sets and abstention, and measures the scores before and after. Where the rows cannot tell, scale and
    temperature stay 1. Use the same --num-samples and --quantization as in serving.
    """
    parsed = _levels(levels)
    if plot is not None and (plot.suffix not in PLOT_FILES or not plot.absolute().parent.is_dir()):
        raise typer.BadParameter(
            f"must be a file in an existing folder, with a name that ends in {', '.join(PLOT_FILES)} (got {str(plot)!r})",
            param_hint="--plot",
        )
    with errors_as_messages():
        from tqdm import tqdm

        from scalabl.evaluation.calibration import Options
        from scalabl.evaluation.calibration import calibrate as run
        from scalabl.evaluation.dataset import review
        from scalabl.evaluation.dataset.examples import read_rows
        from scalabl.files.adapter_directory import fingerprint_of_files, read_config, save_config

        plots = plots_module() if plot is not None else None
        rows = read_rows(data, columns_of(text_column, label_column))
        examples = examples_for(read_config(adapter).task, rows)
        warn(review.repeated_texts(rows.name, examples))
        loaded = load(adapter, model, device, quantization)
        fingerprint = fingerprint_of_files(adapter)
        config = loaded.model.config
        loaded.model.config = config.model_copy(update={"posterior_scale": 1.0, "temperature": 1.0, "calibration": None})
        options = Options(parsed, method, target_risk if abstain else None, risk_confidence, split_seed)
        with tqdm(desc=Path(rows.name).name, unit="input") as bar:
            outcome = run(
                loaded.model,
                loaded.encode(examples),
                loaded.draws(num_samples, seed),
                options,
                name=rows.name,
                sha256=rows.sha256,
                on_progress=bar.update,
            )
        fitted = {
            "posterior_scale": outcome.posterior_scale,
            "temperature": outcome.temperature,
            "calibration": outcome.calibration,
        }
        if fingerprint_of_files(adapter) != fingerprint:
            raise ScalaBLError(f"{adapter} was changed while it was calibrated; nothing was written, so calibrate it again")
        save_config(adapter, config.model_copy(update=fitted))
        if plots is not None:
            plots.save_fit(outcome, plot)
        report = {**fitted, "calibration": outcome.calibration.model_dump(mode="json")}
        report["trials"] = [dataclasses.asdict(trial) for trial in outcome.trials]
        report["notes"] = outcome.notes
        for note in outcome.notes:
            typer.echo(f"note: {note}", err=True)
        typer.echo(json.dumps(report, indent=2))
        if outcome.refusal is not None:
            raise ScalaBLError(
                f"{outcome.refusal}. The rest of the calibration was written into the adapter; it will never abstain"
            )


def _levels(text: str) -> tuple[float, ...]:
    try:
        levels = tuple(float(part) for part in split(text))
    except ValueError:
        levels = ()
    if not levels or not all(0 < level < 1 for level in levels):
        raise typer.BadParameter(f"must be comma-separated numbers between 0 and 1 (got {text!r})", param_hint="--levels")
    return tuple(dict.fromkeys(levels))
