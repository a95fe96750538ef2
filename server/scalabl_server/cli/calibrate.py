"""`scalabl calibrate`: fits posterior scale, temperature and thresholds on held-out labels. The fit is in `scalabl`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from scalabl.config import Novelty, SetMethod
from scalabl.errors import ScalaBLError
from scalabl.uncertainty.novelty import MOST_ROWS
from scalabl_server.cli.shared.labelled_data import (
    ROWS_HELP,
    Adapter,
    Device,
    LabelColumn,
    Loaded,
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
from scalabl_server.cli.shared.options import LARGEST_SEED, split

if TYPE_CHECKING:
    from scalabl.evaluation.calibration import Options, Outcome
    from scalabl.evaluation.dataset.examples import Rows
    from scalabl.evaluation.encoded import EncodedSet
    from scalabl.model.posterior import Draws
    from scalabl.uncertainty.novelty import NoveltyReference

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
    reference: Annotated[
        str | None,
        typer.Option(help="Training rows, as --data, from which to make the novelty reference, in place of an old one."),
    ] = None,
    novelty_rows: Annotated[
        int, typer.Option(min=2, help="The most rows that a reference made from --reference keeps.")
    ] = MOST_ROWS,
    novelty_level: Annotated[
        float,
        typer.Option(min=0.0001, max=0.5, help="Largest share of inputs like --data that may be called novel."),
    ] = 0.05,
    novelty_only: Annotated[
        bool, typer.Option("--novelty-only", help="Change novelty only; scale, temperature and thresholds stay.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a plot of the fit to this file (.png, .svg or .pdf).")] = None,
    device: Device = "auto",
    quantization: Precision = None,
) -> None:
    """Calibrate an adapter on held-out labels and write the result into its configuration.

    Half of the rows, chosen at random, fit the posterior scale and the temperature. The other half sets the thresholds for
    prediction sets and abstention, and measures the scores before and after. Where the rows cannot tell, scale and
    temperature stay 1. If the adapter has a novelty reference, all rows give its p-values. Use the same --num-samples and
    --quantization as in serving.
    """
    parsed = _levels(levels)
    if plot is not None and (plot.suffix not in PLOT_FILES or not plot.absolute().parent.is_dir()):
        raise typer.BadParameter(
            f"must be a file in an existing folder, with a name that ends in {', '.join(PLOT_FILES)} (got {str(plot)!r})",
            param_hint="--plot",
        )
    if novelty_only and plot is not None:
        raise typer.BadParameter("there is no fit to plot with --novelty-only; leave one of them out", param_hint="--plot")
    from scalabl.evaluation.calibration import Options
    from scalabl.evaluation.dataset import review
    from scalabl.evaluation.dataset.examples import read_rows
    from scalabl.evaluation.novelty_fit import check_rows_for_level
    from scalabl.files.adapter_directory import fingerprint_of_files, read_config, save_config
    from scalabl.files.novelty_file import save_novelty

    plots = plots_module() if plot is not None else None
    columns, task = columns_of(text_column, label_column), read_config(adapter).task
    rows = read_rows(data, columns)
    examples = examples_for(task, rows)
    warn(review.repeated_texts(rows.name, examples))
    known = None if reference is None else examples_for(task, read_rows(reference, columns))
    # An old reference is not read where a new one replaces it, so that a broken one can be made again.
    loaded = load(adapter, model, device, quantization, with_novelty=known is None)
    if loaded.novelty is not None or known is not None:
        check_rows_for_level(len(examples), novelty_level)
    elif novelty_only:
        raise ScalaBLError(f"{adapter} has no novelty reference; add --reference with its training rows")
    fingerprint = fingerprint_of_files(adapter)
    config, encoded, draws = loaded.model.config, loaded.encode(examples), loaded.draws(num_samples, seed)
    outcome, novelty = None, None
    report: dict[str, Any] = {}
    if not novelty_only:
        options = Options(parsed, method, target_risk if abstain else None, risk_confidence, split_seed)
        outcome = _fit(loaded, encoded, draws, options, rows)
        fitted = {
            "posterior_scale": outcome.posterior_scale,
            "temperature": outcome.temperature,
            "calibration": outcome.calibration,
        }
        config = config.model_copy(update=fitted)
        report = {**fitted, "calibration": outcome.calibration.model_dump(mode="json")}
        report["trials"] = [dataclasses.asdict(trial) for trial in outcome.trials]
        report["notes"] = outcome.notes
    loaded.model.config = config
    if loaded.novelty is not None or known is not None:
        made_from = None if known is None else loaded.encode(known)
        novelty = _novelty(loaded, adapter, encoded, draws, novelty_level, made_from, novelty_rows)
        report["novelty"] = novelty[0].model_dump(mode="json")
    if fingerprint_of_files(adapter) != fingerprint:
        raise ScalaBLError(f"{adapter} was changed while it was calibrated; nothing was written, so calibrate it again")
    if novelty is not None:
        save_novelty(adapter, config, *novelty)
    else:
        save_config(adapter, config)
    if plots is not None:
        plots.save_fit(outcome, plot)
    for note in report.get("notes", ()):
        typer.echo(f"note: {note}", err=True)
    typer.echo(json.dumps(report, indent=2))
    if outcome is not None and outcome.refusal is not None:
        raise ScalaBLError(
            f"{outcome.refusal}. The rest of the calibration was written into the adapter; it will never abstain"
        )


def _fit(loaded: Loaded, encoded: EncodedSet, draws: Draws, options: Options, rows: Rows) -> Outcome:
    """Scale, temperature and thresholds from the rows of a file, starting from the posterior as trained."""
    from tqdm import tqdm

    from scalabl.evaluation import calibration

    loaded.model.config = loaded.model.config.model_copy(
        update={"posterior_scale": 1.0, "temperature": 1.0, "calibration": None}
    )
    with tqdm(desc=Path(rows.name).name, unit="input") as bar:
        return calibration.calibrate(
            loaded.model,
            encoded,
            draws,
            options,
            name=rows.name,
            sha256=rows.sha256,
            on_progress=bar.update,
        )


def _novelty(
    loaded: Loaded,
    adapter: Path,
    encoded: EncodedSet,
    draws: Draws,
    level: float,
    made_from: EncodedSet | None,
    most_rows: int,
) -> tuple[Novelty, NoveltyReference]:
    """The adapter's novelty reference with p-values from held-out rows, and what the configuration says of it.

    Args:
        made_from: training rows from which to make a new reference, of which at most `most_rows` are kept; None to take the
            adapter's own.
    """
    from tqdm import tqdm

    from scalabl.evaluation.novelty_fit import calibrated_reference, calibration_of, description_of, make_reference

    with tqdm(desc="novelty", unit="input") as bar:
        if made_from is not None:
            uncalibrated = make_reference(loaded.model, made_from, most_rows=most_rows, on_progress=bar.update)
            described = description_of(adapter, loaded.model.config, made_from, uncalibrated)
        else:
            assert loaded.novelty is not None and loaded.model.config.novelty is not None  # noqa: PT018  (the caller's)
            uncalibrated, described = loaded.novelty, loaded.model.config.novelty
        reference = calibrated_reference(loaded.model, encoded, draws, uncalibrated, on_progress=bar.update)
    described = described.model_copy(update={"calibration": calibration_of(encoded, draws, level)})
    return described, reference


def _levels(text: str) -> tuple[float, ...]:
    try:
        levels = tuple(float(part) for part in split(text))
    except ValueError:
        levels = ()
    if not levels or not all(0 < level < 1 for level in levels):
        raise typer.BadParameter(f"must be comma-separated numbers between 0 and 1 (got {text!r})", param_hint="--levels")
    return tuple(dict.fromkeys(levels))
