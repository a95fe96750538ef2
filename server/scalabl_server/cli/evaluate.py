"""`scalabl evaluate`: scores an adapter's probabilities and uncertainties on labelled rows. The scores are in `scalabl`."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scalabl.model.posterior import DEFAULT_SCHEME
from scalabl_server.cli.labelled_data import (
    Adapter,
    Device,
    Loaded,
    Model,
    NumSamples,
    Precision,
    Seed,
    data_name,
    load,
    plots_module,
)
from scalabl_server.cli.options import errors_as_messages
from scalabl_server.cli.tables import print_report
from scalabl_server.methods import Method

if TYPE_CHECKING:
    from scalabl.evaluation.dataset import Example
    from scalabl.evaluation.report import Evaluated


def evaluate(
    adapter: Adapter,
    data: Annotated[Path, typer.Option(help="Labelled rows, JSONL.")],
    model: Model = None,
    ood: Annotated[
        list[Path] | None,
        typer.Option(help="Out-of-distribution inputs, to which no choice applies, JSONL. May be repeated."),
    ] = None,
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
        int, typer.Option(min=0, help="Bootstrap resamples for the 95% intervals (0: no intervals).")
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
    with errors_as_messages():
        from scalabl.evaluation.dataset import read_examples
        from scalabl.evaluation.report import report

        draw = plots_module() if plots is not None else None
        examples = read_examples(data)
        others = {path: read_examples(path, labelled=False) for path in ood or []}
        loaded = load(adapter, model, device, quantization)

        def evaluated(rows: list[Example], path: Path) -> Evaluated:
            return _evaluate(loaded, rows, path, method, num_samples, seed)

        inside = evaluated(examples, data)
        outside = [evaluated(rows, path) for path, rows in others.items()]
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


def _evaluate(loaded: Loaded, rows: list[Example], path: Path, method: Method, num_samples: int, seed: int) -> Evaluated:
    from tqdm import tqdm

    from scalabl.evaluation.inference import linearized_with_states, predictive_of, readings_of
    from scalabl.evaluation.report import Evaluated, NoveltyScores
    from scalabl.uncertainty.linearized import NEGLIGIBLE

    encoded, draws = loaded.encode(rows), loaded.draws(num_samples, seed)
    started = time.perf_counter()
    with tqdm(total=len(rows), desc=path.name, unit="input") as bar:
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
    return Evaluated(data_name(path), outcome, encoded.answers, encoded.num_choices, tokens, seconds, novelty)
