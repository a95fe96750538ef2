"""The commands that run an adapter over labelled data: `scalabl evaluate` and `scalabl calibrate`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from scalabl.config import Quantization, SetMethod
from scalabl.errors import ScalaBLError
from scalabl.model.posterior import DEFAULT_SCHEME
from scalabl_server.cli.options import errors_as_messages, split
from scalabl_server.cli.tables import print_report

if TYPE_CHECKING:
    from scalabl.evaluation.dataset import Example
    from scalabl.evaluation.encoded import EncodedSet
    from scalabl.evaluation.report import Evaluated
    from scalabl.model.scalabl_model import ScalaBLModel
    from scalabl.prompt import Prompter

Method = Literal["monte_carlo", "linearized", "control_variate"]
PLOT_FILES = (".png", ".svg", ".pdf")

Adapter = Annotated[Path, typer.Option(help="The adapter directory.")]
Data = Annotated[Path, typer.Option(help="Labelled rows, JSONL.")]
Model = Annotated[str | None, typer.Option(help="Base model (default: the one that the adapter names).")]
NumSamples = Annotated[int, typer.Option(min=1, help="K, posterior samples per input.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the draws.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, … (auto: a GPU when there is one).")]
Precision = Annotated[Quantization | None, typer.Option(help="Linear layers in lower precision, as in serve.")]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """An adapter on its base model, with its prompts."""

    model: ScalaBLModel
    prompter: Prompter
    max_tokens: int

    def encode(self, rows: list[Example]) -> EncodedSet:
        from scalabl.evaluation.encoded import encode_examples

        return encode_examples(self.prompter, rows, self.max_tokens)


def _load(adapter: Path, model: str | None, device: str, quantization: Quantization | None) -> Loaded:
    from scalabl.base.pretrained import load_pretrained
    from scalabl.files.adapter_directory import load_adapter, read_config
    from scalabl.prompt import Prompter

    config = read_config(adapter)
    pretrained = load_pretrained(model or config.base_model_name_or_path, device=device, quantization=quantization)
    prompter = Prompter(config.task, pretrained.tokenizer)
    return Loaded(load_adapter(pretrained.model, adapter), prompter, pretrained.max_tokens)


def evaluate(
    adapter: Adapter,
    data: Data,
    model: Model = None,
    ood: Annotated[list[Path] | None, typer.Option(help="Inputs outside the choices, JSONL; may be repeated.")] = None,
    num_samples: NumSamples = 16,
    seed: Seed = 0,
    method: Annotated[
        Method, typer.Option(help="From samples, linearized around their mean (no samples), or samples corrected by that.")
    ] = "monte_carlo",
    bootstrap: Annotated[int, typer.Option(min=0, help="Resamples behind each 95% interval (0: no intervals).")] = 1000,
    output: Annotated[Path | None, typer.Option(help="Write the JSON here.")] = None,
    plots: Annotated[Path | None, typer.Option(help="Draw reliability, risk-coverage and MI into this folder.")] = None,
    device: Device = "auto",
    quantization: Precision = None,
) -> None:
    """Score an adapter: accuracy, calibration, and how well its uncertainty finds wrong answers and OOD inputs.

    A table goes to standard error, the JSON to --output and, unless it is a terminal, to standard output.
    """
    with errors_as_messages():
        from scalabl.evaluation.dataset import read_examples
        from scalabl.evaluation.report import report

        draw = _plots() if plots is not None else None
        examples = read_examples(data)
        others = {path: read_examples(path, labelled=False) for path in ood or []}
        loaded = _load(adapter, model, device, quantization)

        def evaluated(rows: list[Example], path: Path) -> Evaluated:
            return _evaluate(loaded, rows, path, method, num_samples, seed)

        inside = evaluated(examples, data)
        outside = [evaluated(rows, path) for path, rows in others.items()]
        found = {
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
        print_report(found)
        text = json.dumps(found, indent=2)
        if output is not None:
            output.write_text(text + "\n", encoding="utf-8")
        if not sys.stdout.isatty():
            typer.echo(text)


def _evaluate(loaded: Loaded, rows: list[Example], path: Path, method: Method, num_samples: int, seed: int) -> Evaluated:
    from tqdm import tqdm

    from scalabl.evaluation.inference import linearized_predictive, logits_of, predictive_of
    from scalabl.evaluation.report import Evaluated
    from scalabl.uncertainty.linearized import NEGLIGIBLE

    encoded, draws = loaded.encode(rows), loaded.model.draws(num_samples, seed)
    started = time.perf_counter()
    with tqdm(total=len(rows), desc=path.name, unit="input") as bar:
        if method != "monte_carlo":
            outcome = linearized_predictive(
                loaded.model,
                encoded,
                draws=draws if method == "control_variate" else None,
                negligible=NEGLIGIBLE,
                on_progress=bar.update,
            )
        else:
            logits = logits_of(loaded.model, encoded.sequences, draws, on_progress=bar.update)
            outcome = predictive_of(logits, encoded.num_choices, loaded.model, draws)
    seconds, tokens = time.perf_counter() - started, sum(map(len, encoded.sequences))
    return Evaluated(_name(path), outcome, encoded.answers, encoded.num_choices, tokens, seconds)


def _plots() -> ModuleType:
    """The module that draws, asked for before the long work."""
    try:
        from scalabl.evaluation import plots
    except ModuleNotFoundError:
        raise ScalaBLError("plots need matplotlib; install it with: pip install 'scalabl[plots]'") from None
    return plots


def _name(data: Path) -> str:
    return f"{data.resolve().parent.name}/{data.name}"


def calibrate(
    adapter: Adapter,
    data: Annotated[Path, typer.Option(help="Labelled rows, JSONL, that took no part in training.")],
    model: Model = None,
    num_samples: NumSamples = 16,
    seed: Seed = 0,
    levels: Annotated[str, typer.Option(help="Comma-separated coverages of prediction sets.")] = "0.8,0.9,0.95",
    method: Annotated[SetMethod, typer.Option(help="Kind of the prediction sets that are served.")] = "lac",
    target_risk: Annotated[
        float, typer.Option(min=0.001, max=1, help="Largest share of wrong answers among those that are not abstained from.")
    ] = 0.05,
    risk_confidence: Annotated[
        float, typer.Option(min=0, max=0.999, help="Probability with which the target risk is to hold.")
    ] = 0.9,
    abstain: Annotated[bool, typer.Option(help="Find an abstention threshold.")] = True,
    split_seed: Annotated[int, typer.Option(min=0, help="Seed of the split into fit and threshold rows.")] = 0,
    plot: Annotated[Path | None, typer.Option(help="Draw the fit into this file (.png, .svg, .pdf).")] = None,
    device: Device = "auto",
    quantization: Precision = None,
) -> None:
    """Fit posterior scale and temperature on held-out labels, find thresholds for prediction sets and abstention, and write
    them into the adapter.

    Half of the rows, chosen at random, fit scale and temperature; the other half gives the thresholds and the numbers
    before and after. Calibrate with the --num-samples and the --quantization that are served.
    """
    parsed = _levels(levels)
    if plot is not None and (plot.suffix not in PLOT_FILES or not plot.absolute().parent.is_dir()):
        raise typer.BadParameter(f"a file in an existing folder that ends in {', '.join(PLOT_FILES)}", param_hint="--plot")
    with errors_as_messages():
        from tqdm import tqdm

        from scalabl.evaluation.calibration import Options
        from scalabl.evaluation.calibration import calibrate as run
        from scalabl.evaluation.dataset import read_examples
        from scalabl.files.adapter_directory import save_config

        plots = _plots() if plot is not None else None
        rows = read_examples(data)
        loaded = _load(adapter, model, device, quantization)
        config = loaded.model.config
        loaded.model.config = config.model_copy(update={"posterior_scale": 1.0, "temperature": 1.0, "calibration": None})
        options = Options(parsed, method, target_risk if abstain else None, risk_confidence, split_seed)
        with tqdm(desc=data.name, unit="input") as bar:
            outcome = run(
                loaded.model,
                loaded.encode(rows),
                loaded.model.draws(num_samples, seed),
                options,
                name=_name(data),
                sha256=hashlib.sha256(data.read_bytes()).hexdigest(),
                on_progress=bar.update,
            )
        found = {
            "posterior_scale": outcome.posterior_scale,
            "temperature": outcome.temperature,
            "calibration": outcome.calibration,
        }
        save_config(adapter, config.model_copy(update=found))
        if plots is not None:
            plots.save_fit(outcome, plot)
        report = {**found, "calibration": outcome.calibration.model_dump(mode="json")}
        report["trials"] = [dataclasses.asdict(trial) for trial in outcome.trials]
        typer.echo(json.dumps(report, indent=2))
        if outcome.refusal is not None:
            raise ScalaBLError(f"{outcome.refusal}. Everything else was written into the adapter, which never abstains now")


def _levels(text: str) -> tuple[float, ...]:
    try:
        levels = tuple(float(part) for part in split(text))
    except ValueError:
        levels = ()
    if not levels or not all(0 < level < 1 for level in levels):
        raise typer.BadParameter(f"comma-separated numbers between 0 and 1 are needed (got {text!r})", param_hint="--levels")
    return tuple(dict.fromkeys(levels))
