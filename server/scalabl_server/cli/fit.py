"""`scalabl fit`: gives a trained adapter or LoRA a posterior, without training. The fit is in `scalabl`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scalabl.config import SpecialTokensInText, TaskKind
from scalabl.training.recipe import FitConfig
from scalabl_server.cli.convert import Label, Labels
from scalabl_server.cli.shared.labelled_data import (
    ROWS_HELP,
    Device,
    LabelColumn,
    Model,
    TextColumn,
    columns_of,
    examples_for,
)
from scalabl_server.cli.shared.options import (
    command_for,
    given_labels,
    own_head_task,
    task_of,
    usage_errors,
)

if TYPE_CHECKING:
    from torch import Tensor

    from scalabl.config import AdapterConfig
    from scalabl.evaluation.dataset.examples import Rows

SIGMA_BEFORE = 0.1  # share of each mean; any value will do, since the fit replaces it


@dataclass(frozen=True)
class LoraOptions:
    """What a LoRA's own files do not say, as given by the options; None for those that were left out."""

    kind: TaskKind | None
    template: str | None
    chat: bool | None
    choice_prefix: str | None
    special_tokens_in_text: SpecialTokensInText | None
    base_model_name: str | None
    labels: tuple[str, ...] | None


def _fit(
    settings: FitConfig,
    adapter: Annotated[Path, typer.Argument(help="An adapter directory, or the directory of a LoRA that PEFT saved.")],
    data: Annotated[str, typer.Option(help=f"The rows that it was trained on: {ROWS_HELP}.")],
    output: Annotated[
        Path | None,
        typer.Option(help="The adapter directory to write (default: the adapter itself). A LoRA needs one."),
    ] = None,
    validation: Annotated[
        str | None, typer.Option(help="Held-out rows, to choose the prior precision by their NLL.")
    ] = None,
    text_column: TextColumn = None,
    label_column: LabelColumn = None,
    model: Model = None,
    kind: Annotated[
        TaskKind | None,
        typer.Option(help="Of a LoRA. classification: fixed choices; multiple_choice: choices come with each input."),
    ] = None,
    template: Annotated[str | None, typer.Option(help="Of a LoRA: the prompt template that it was trained with.")] = None,
    chat: Annotated[bool | None, typer.Option(help="Of a LoRA: wrap the prompt in the tokenizer's chat template.")] = None,
    choice_prefix: Annotated[
        str | None,
        typer.Option(help="Of a LoRA: text between prompt and choice (default: a space, or nothing with --chat)."),
    ] = None,
    special_tokens_in_text: Annotated[
        SpecialTokensInText | None,
        typer.Option(help="Of a LoRA: encode special tokens in an input as text (the default), or as control tokens."),
    ] = None,
    label: Label = None,
    labels: Labels = None,
    base_model_name: Annotated[
        str | None, typer.Option(help="Of a LoRA: the base model's name to record (default: --model).")
    ] = None,
    device: Device = "auto",
    overwrite: Annotated[
        bool, typer.Option(help="Replace the adapter in --output, and begin an interrupted fit anew.")
    ] = False,
) -> None:
    """Fit a posterior around a trained adapter or LoRA from its training rows, without training.

    The means stay as they are. Their uncertainty comes from how sharply the rows determine them (a Laplace approximation).
    A former posterior and calibration are replaced, and a novelty reference is removed, so calibrate afterwards. The same
    command resumes an interrupted fit.
    """
    from tqdm import tqdm

    from scalabl.base.pretrained import load_pretrained
    from scalabl.evaluation.dataset.examples import read_rows
    from scalabl.evaluation.encoded import encode_examples
    from scalabl.files.adapter_directory import adapter_from
    from scalabl.files.peft_import import is_peft
    from scalabl.prompt import Prompter
    from scalabl.training.posterior_fit import check_output, check_size, fit_posterior, write_fit

    columns, given = columns_of(text_column, label_column), given_labels(labels, label) if labels or label else None
    rows = read_rows(data, columns)
    options = LoraOptions(kind, template, chat, choice_prefix, special_tokens_in_text, base_model_name, given)
    from_lora = is_peft(adapter)
    target = output or adapter
    check_output(adapter, target, from_lora=from_lora, overwrite=overwrite)
    base, config, weights = (_lora if from_lora else _adapter)(adapter, model, options, rows)
    examples = examples_for(config.task, rows)
    held_out = None if validation is None else examples_for(config.task, read_rows(validation, columns))
    check_size(sum(t.shape[-1] for name, t in weights.items() if name.endswith(".s_mean")), settings)
    pretrained = load_pretrained(base, device=device, dtype="float32")
    prompter = Prompter(config.task, pretrained.tokenizer)
    training_set = encode_examples(prompter, examples, pretrained.max_tokens)
    validation_set = None if held_out is None else encode_examples(prompter, held_out, pretrained.max_tokens)
    with tqdm(total=min(settings.max_rows, len(examples)), desc=Path(rows.name).name, unit="row") as bar:
        fitted = fit_posterior(
            adapter_from(pretrained.model, config, weights),
            training_set,
            settings,
            target,
            held_out=validation_set,
            overwrite=overwrite,
            on_progress=bar.update,
        )
    write_fit(adapter, target, fitted, overwrite=overwrite)
    for note in fitted.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(json.dumps(fitted.report, indent=2))


def _adapter(
    folder: Path, model: str | None, options: LoraOptions, rows: Rows
) -> tuple[str, AdapterConfig, dict[str, Tensor]]:
    """(base model, configuration, tensors) of an adapter directory."""
    from scalabl.files.adapter_directory import read_config, read_weights

    for name, value in vars(options).items():
        if value is not None:
            hint = "--" + name.replace("_", "-")
            raise typer.BadParameter(f"{folder} is an adapter, which has its own; leave the option out", param_hint=hint)
    config = read_config(folder)
    return model or config.base_model_name_or_path, config, read_weights(folder)


def _lora(folder: Path, model: str | None, options: LoraOptions, rows: Rows) -> tuple[str, AdapterConfig, dict[str, Tensor]]:
    """(base model, configuration, tensors) of a LoRA that PEFT saved, as `scalabl convert peft` makes them."""
    from scalabl.base.pretrained import load_skeleton
    from scalabl.evaluation.dataset.examples import check_labels
    from scalabl.files.peft_head import class_names
    from scalabl.files.peft_import import adapter_of, read_peft, with_relative_sigma
    from scalabl.prompt import Prompter, letters

    lora = read_peft(folder)
    base = model or lora.base_model
    if base is None:
        raise typer.BadParameter("the LoRA does not name its base model; give it", param_hint="--model")
    skeleton, tokenizer = load_skeleton(base)
    kind, special = options.kind or "classification", options.special_tokens_in_text or "text"
    with usage_errors():
        if lora.head is not None:
            names = options.labels or lora.labels or class_names(skeleton.config.to_dict(), len(lora.head))
            choices = names or given_labels(None, None)
            task = own_head_task(options.template or "{input}", bool(options.chat), choices, special, kind)
        else:
            if kind == "multiple_choice":
                choices = letters(max(len(row.choices) for row in rows.examples(None)[0]))
            else:
                choices = options.labels or check_labels(rows.labels, rows.name)
            task = task_of(kind, options.template, bool(options.chat), options.choice_prefix, choices, special)
    config, tensors = adapter_of(
        lora,
        skeleton,
        Prompter(task, tokenizer).resolved_task,
        base_model_name_or_path=options.base_model_name or base,
    )
    return base, config, with_relative_sigma(tensors, SIGMA_BEFORE)


fit = command_for(FitConfig, _fit)
