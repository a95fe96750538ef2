"""`scalabl fit`: gives a trained adapter or LoRA a posterior, without training. The fit is in `scalabl`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from scalabl.config import TaskKind
from scalabl.training.recipe import FitConfig
from scalabl_server.cli.labelled_data import Device, Model
from scalabl_server.cli.options import command_for, errors_as_messages, task_of, usage_errors

if TYPE_CHECKING:
    from torch import Tensor

    from scalabl.config import AdapterConfig
    from scalabl.evaluation.dataset import Example

SIGMA_BEFORE = 0.1  # share of each mean; any value will do, since the fit replaces it


@dataclass(frozen=True)
class LoraOptions:
    """What a LoRA's own files do not say, as given by the options; None for those that were left out."""

    kind: TaskKind | None
    template: str | None
    chat: bool | None
    choice_prefix: str | None
    base_model_name: str | None


def _fit(
    settings: FitConfig,
    adapter: Annotated[Path, typer.Argument(help="An adapter directory, or the directory of a LoRA that PEFT saved.")],
    data: Annotated[Path, typer.Option(help="The rows that it was trained on, JSONL.")],
    output: Annotated[
        Path | None,
        typer.Option(help="The adapter directory to write (default: the adapter itself). A LoRA needs one."),
    ] = None,
    validation: Annotated[
        Path | None, typer.Option(help="Held-out rows, JSONL, to choose the prior precision by their NLL.")
    ] = None,
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
    A former posterior and calibration are replaced, so calibrate afterwards. The same command resumes an interrupted fit.
    """
    with errors_as_messages():
        from tqdm import tqdm

        from scalabl.base.pretrained import load_pretrained
        from scalabl.evaluation.dataset import read_examples
        from scalabl.evaluation.encoded import encode_examples
        from scalabl.files.adapter_directory import adapter_from
        from scalabl.files.peft_import import is_peft
        from scalabl.prompt import Prompter
        from scalabl.training.posterior_fit import check_output, check_size, fit_posterior, write_fit

        rows = read_examples(data)
        held_out = None if validation is None else read_examples(validation)
        options = LoraOptions(kind, template, chat, choice_prefix, base_model_name)
        from_lora = is_peft(adapter)
        target = output or adapter
        check_output(adapter, target, from_lora=from_lora, overwrite=overwrite)
        base, config, weights = (_lora if from_lora else _adapter)(adapter, model, options, rows)
        check_size(sum(t.shape[-1] for name, t in weights.items() if name.endswith(".s_mean")), settings)
        pretrained = load_pretrained(base, device=device, dtype="float32")
        prompter = Prompter(config.task, pretrained.tokenizer)
        training_set = encode_examples(prompter, rows, pretrained.max_tokens)
        validation_set = None if held_out is None else encode_examples(prompter, held_out, pretrained.max_tokens)
        with tqdm(total=min(settings.max_rows, len(rows)), desc=data.name, unit="row") as bar:
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
    folder: Path, model: str | None, options: LoraOptions, rows: list[Example]
) -> tuple[str, AdapterConfig, dict[str, Tensor]]:
    """(base model, configuration, tensors) of an adapter directory."""
    from scalabl.files.adapter_directory import read_config, read_weights

    for name, value in vars(options).items():
        if value is not None:
            hint = "--" + name.replace("_", "-")
            raise typer.BadParameter(f"{folder} is an adapter, which has its own; leave the option out", param_hint=hint)
    config = read_config(folder)
    return model or config.base_model_name_or_path, config, read_weights(folder)


def _lora(
    folder: Path, model: str | None, options: LoraOptions, rows: list[Example]
) -> tuple[str, AdapterConfig, dict[str, Tensor]]:
    """(base model, configuration, tensors) of a LoRA that PEFT saved, as `scalabl convert peft` makes them."""
    from scalabl.base.pretrained import load_skeleton
    from scalabl.files.peft_import import adapter_of, read_peft, with_relative_sigma
    from scalabl.prompt import Prompter

    lora = read_peft(folder)
    base = model or lora.base_model
    if base is None:
        raise typer.BadParameter("the LoRA does not name its base model; give it", param_hint="--model")
    kind = options.kind or "classification"
    choices = rows[0].choices
    if kind == "multiple_choice":
        choices = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: max(len(row.choices) for row in rows)])
    with usage_errors():
        task = task_of(kind, options.template, bool(options.chat), options.choice_prefix, choices)
    skeleton, tokenizer = load_skeleton(base)
    config, tensors = adapter_of(
        lora,
        skeleton,
        Prompter(task, tokenizer).resolved_task,
        base_model_name_or_path=options.base_model_name or base,
    )
    return base, config, with_relative_sigma(tensors, SIGMA_BEFORE)


fit = command_for(FitConfig, _fit)
