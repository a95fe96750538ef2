"""`scalabl evaluate`: scores an adapter's probabilities and uncertainties on labelled rows. The scores are in `scalabl`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scalabl.model.posterior import DEFAULT_SCHEME
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
from scalabl_server.cli.shared.tables import print_report
from scalabl_server.methods import Method

if TYPE_CHECKING:
    from scalabl.evaluation.dataset import Example
    from scalabl.evaluation.report import Evaluated


def evaluate(
    adapter: Adapter,
    data: Annotated[str, typer.Option(help=f"Labelled rows: {ROWS_HELP}.")],
    model: Model = None,
    ood: Annotated[
        list[str] | None,
        typer.Option(help="Out-of-distribution inputs, to which no choice applies; they need no labels. May be repeated."),
    ] = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    num_samples: NumSamples = 16,
    seed: Seed = 0,
    method: Annotated[
        Method,
        typer.Option(
            help="monte_carlo: average posterior samples; linearized: linearise around the posterior mean, without samples; "
            "control_variate: samples, corrected by the linearisation."
        ),
    ] = "monte_carlo",
    bootstrap: Annotated[
        int, typer.Option(min=0, max=1_000_000, help="Bootstrap resamples for the 95% intervals (0: no intervals).")
    ] = 1000,
    output: Annotated[Path | None, typer.Option(help="Write the JSON report to this file.")] = None,
    plots: Annotated[
        Path | None, typer.Option(help="Write plots of reliability, risk-coverage and mutual information to this folder.")
    ] = None,
    device: Device = "auto",
    quantization: Precision = None,
) -> None:
    """Score an adapter: accuracy, calibration, and how well its uncertainty detects wrong answers and out-of-distribution
    inputs.

    Tables go to standard error. The JSON report goes to --output and to standard output, unless that is a terminal.
    """
    if output is not None and (output.is_dir() or not output.absolute().parent.is_dir()):
        raise typer.BadParameter("a file in an existing folder", param_hint="--output")
    if plots is not None and plots.exists() and not plots.is_dir():
        raise typer.BadParameter(f"must be a folder, and a file has this name (got {str(plots)!r})", param_hint="--plots")
    from scalabl.evaluation.dataset import review
    from scalabl.evaluation.dataset.examples import read_rows
    from scalabl.evaluation.report import report
    from scalabl.files.adapter_directory import read_config

    draw = plots_module() if plots is not None else None
    columns, task = columns_of(text_column, label_column), read_config(adapter).task
    rows = read_rows(data, columns)
    others = [read_rows(name, columns, labelled=False) for name in dict.fromkeys(ood or [])]
    examples = examples_for(task, rows)
    sets = [(other.name, examples_for(task, other, labelled=False)) for other in others]
    warn(*(review.shared_texts(name, inputs, rows.name, examples) for name, inputs in sets))
    loaded = load(adapter, model, device, quantization)

    def evaluated(rows: list[Example], name: str) -> Evaluated:
        return _evaluate(loaded, rows, name, method, num_samples, seed)

    inside = evaluated(examples, rows.name)
    outside = [evaluated(inputs, name) for name, inputs in sets]
    scores = {
        "adapter": adapter.name,
        "method": method,
        "num_samples": 0 if method == "linearized" else num_samples,
        "seed": seed,
        "draw_scheme": DEFAULT_SCHEME,
        "quantization": quantization,
        **report(inside, outside, loaded.model.config.calibration, repeats=bootstrap),
    }
    if draw is not None:
        draw.save_evaluation(inside, outside, plots)
    print_report(scores)
    text = json.dumps(scores, indent=2)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")
    if not sys.stdout.isatty():
        typer.echo(text)


def _evaluate(loaded: Loaded, rows: list[Example], name: str, method: Method, num_samples: int, seed: int) -> Evaluated:
    from tqdm import tqdm

    from scalabl.evaluation.inference import linearized_with_states, predictive_of, readings_of
    from scalabl.evaluation.report import Evaluated, NoveltyScores
    from scalabl.uncertainty.linearized import NEGLIGIBLE

    encoded, draws = loaded.encode(rows), loaded.draws(num_samples, seed)
    started = time.perf_counter()
    with tqdm(total=len(rows), desc=Path(name).name, unit="input") as bar:
        if method != "monte_carlo":
            outcome, states = linearized_with_states(
                loaded.model,
                encoded,
                draws=draws if method == "control_variate" else None,
                negligible=NEGLIGIBLE,
                on_progress=bar.update,
            )
        else:
            readings = readings_of(loaded.model, encoded.sequences, draws, on_progress=bar.update)
            outcome, states = predictive_of(readings.logits, encoded.num_choices, loaded.model, draws), readings.states
    novelty = None
    if loaded.novelty is not None:
        scored = loaded.novelty.scores(states)
        novelty = NoveltyScores(scored, loaded.novelty.p_values(scored), loaded.model.config.novelty_level)
    seconds, tokens = time.perf_counter() - started, sum(map(len, encoded.sequences))
    return Evaluated(name, outcome, encoded.answers, encoded.num_choices, tokens, seconds, novelty)
