"""Shared by commands that read labelled rows: their options, reading the rows with warnings, and loading of the adapter and
of the module that plots.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer

from scalabl.config import Quantization
from scalabl.errors import AdapterError, DatasetError, ScalaBLError
from scalabl_server.cli.options import LARGEST_SEED, MOST_SAMPLES

if TYPE_CHECKING:
    from scalabl.config import Task, TaskKind
    from scalabl.evaluation.dataset import Columns, Example
    from scalabl.evaluation.dataset.examples import Rows
    from scalabl.evaluation.encoded import EncodedSet
    from scalabl.model.posterior import Draws
    from scalabl.model.scalabl_model import ScalaBLModel
    from scalabl.prompt import Prompter

Adapter = Annotated[Path, typer.Option(help="The adapter directory.")]
Model = Annotated[
    str | None, typer.Option(help="Base model: a hub id or a folder (default: the base model that the adapter names).")
]
NumSamples = Annotated[int, typer.Option(min=1, max=MOST_SAMPLES, help="Number of posterior samples (K) per input.")]
Seed = Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the posterior samples.")]
Device = Annotated[str, typer.Option(help="Device of the model: cpu, cuda, … (auto: a GPU if there is one).")]
Precision = Annotated[Quantization | None, typer.Option(help="Run linear layers in lower precision, as in `scalabl serve`.")]
TextColumn = Annotated[
    list[str] | None,
    typer.Option(
        help="Column of the text (default: text, or question). Of several, the texts are joined in order by an empty line."
    ),
]
LabelColumn = Annotated[str | None, typer.Option(help="Column of the label (default: label, or choices and answer).")]
ROWS_HELP = "a JSONL, CSV, TSV or Parquet file, a folder of Hugging Face `datasets`, or a hub id like org/name:split"


@dataclass(frozen=True)
class Loaded:
    """An adapter loaded on its base model, and what turns rows into prompts."""

    model: ScalaBLModel
    prompter: Prompter
    max_tokens: int | None

    def encode(self, rows: list[Example]) -> EncodedSet:
        """The token ids of the rows."""
        from scalabl.evaluation.encoded import encode_examples

        return encode_examples(self.prompter, rows, self.max_tokens)

    def draws(self, num_samples: int, seed: int) -> Draws:
        """The posterior samples.

        Raises:
            AdapterError: the adapter cannot be sampled so often: it has more members, say.
        """
        try:
            return self.model.draws(num_samples, seed)
        except ValueError as error:
            raise AdapterError(str(error)) from None


def load(adapter: Path, model: str | None, device: str, quantization: Quantization | None) -> Loaded:
    """Load the adapter in a folder on `model`, or on the base model that it names."""
    from scalabl.base.pretrained import load_pretrained
    from scalabl.files.adapter_directory import load_adapter, read_config
    from scalabl.prompt import Prompter

    config = read_config(adapter)
    pretrained = load_pretrained(model or config.base_model_name_or_path, device=device, quantization=quantization)
    prompter = Prompter(config.task, pretrained.tokenizer)
    prompter.check_tokenizer(config.base_model_name_or_path)
    return Loaded(load_adapter(pretrained.model, adapter), prompter, pretrained.max_tokens)


@dataclass(frozen=True)
class TrainingData:
    """All choices of a task, examples to train on and to validate with, and `warnings` about them (None for none)."""

    choices: tuple[str, ...]
    training: list[Example]
    validation: list[Example]
    warnings: list[str | None]


def columns_of(text_column: list[str] | None, label_column: str | None) -> Columns:
    """The columns that the options name."""
    from scalabl.evaluation.dataset import Columns

    return Columns(tuple(text_column or ()), label_column)


def examples_for(task: Task, rows: Rows, *, labelled: bool = True) -> list[Example]:
    """The examples of rows for an adapter's task, with a warning for each thing in them that is likely a mistake.

    Rows whose label is none of the task's choices are left out, if they must be labelled.
    """
    from scalabl.evaluation.dataset import review

    labels = task.choices if task.kind == "classification" else None
    examples, left_out = rows.examples(labels, labelled=labelled, unknown="leave out")
    warn(review.unknown_labels(rows.name, left_out, "the adapter"))
    if labels is not None and labelled:
        warn(review.empty_classes(rows.name, labels, examples), review.imbalance(rows.name, labels, examples))
    return examples


def training_examples(
    kind: TaskKind, train: str, validation: str, columns: Columns, labels: tuple[str, ...] | None
) -> TrainingData:
    """The examples of a training run, and what in them is likely a mistake.

    Args:
        labels: the labels in order; None for those of the training rows.

    Raises:
        DatasetError: see `dataset.examples`; also labels for rows that bring their own choices.
    """
    from scalabl.evaluation.dataset import review
    from scalabl.evaluation.dataset.examples import check_labels, read_rows
    from scalabl.prompt import letters

    training, held_out = read_rows(train, columns), read_rows(validation, columns)
    sentences: list[str | None] = []
    if labels is not None and not training.has_labels:
        raise DatasetError(f"the rows of {train} bring their own choices; leave --labels and --label out")
    if kind == "multiple_choice":
        examples, _ = training.examples(None)
        others, _ = held_out.examples(None)
        choices = letters(max(len(row.choices) for row in examples))
    else:
        choices = labels or check_labels(training.labels, train)
        examples, _ = training.examples(choices)
        others, left_out = held_out.examples(choices, unknown="leave out")
        sentences = [
            review.unknown_labels(held_out.name, left_out, training.name if labels is None else "--labels"),
            review.empty_classes(training.name, choices, examples),
            review.empty_classes(held_out.name, choices, others),
            review.imbalance(training.name, choices, examples),
        ]
    sentences.append(review.shared_texts(held_out.name, others, training.name, examples))
    return TrainingData(choices, examples, others, sentences)


def warn(*sentences: str | None) -> None:
    """Print the sentences that are not None on standard error, as warnings."""
    for sentence in sentences:
        if sentence is not None:
            typer.secho(f"warning: {sentence}", fg="yellow", err=True)


def plots_module() -> ModuleType:
    """The module that plots, imported before the long computation so that a missing package is reported at once.

    Raises:
        ScalaBLError: matplotlib is not installed.
    """
    try:
        from scalabl.evaluation import plots
    except ModuleNotFoundError:
        raise ScalaBLError("plots need matplotlib; install it with: pip install 'scalabl[plots]'") from None
    return plots
