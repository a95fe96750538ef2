"""The `scalabl` command: the one place that imports everything. Each command imports what it needs when it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from scalabl import __version__
from scalabl.config import TaskKind
from scalabl.errors import ScalaBLError
from scalabl.training.recipe import TrainingConfig
from scalabl_server.cli.convert import convert, export
from scalabl_server.cli.evaluate import calibrate, evaluate
from scalabl_server.cli.options import command_for, errors_as_messages, split, task_of, usage_errors
from scalabl_server.settings import ServeSettings

app = typer.Typer(
    help="Inference server and tools for ScalaBL, Bayesian low-rank adapters.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(convert, name="convert")
app.add_typer(export, name="export")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"scalabl {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Inference server and tools for ScalaBL, Bayesian low-rank adapters."""


def _serve(settings: ServeSettings) -> None:
    """Serve an adapter over HTTP. Each option can also be set by the environment variable it names."""
    from scalabl_server import listen
    from scalabl_server.observe import logs

    logs.configure(settings.log_level, settings.log_format)
    with errors_as_messages():
        failure = listen.run(settings)
        if isinstance(failure, ScalaBLError):
            raise failure
    if failure is not None:
        raise typer.Exit(1)  # already logged with its traceback


app.command("serve")(command_for(ServeSettings, _serve, env_prefix="SCALABL_"))


def _train(
    recipe: TrainingConfig,
    model: Annotated[str, typer.Option(help="Base model: a hub id or a folder.")],
    train: Annotated[Path, typer.Option(help="Training rows, JSONL.")],
    validation: Annotated[Path, typer.Option(help="Validation rows, JSONL.")],
    output: Annotated[Path, typer.Option(help="The adapter directory to write; a run that was cut short resumes.")],
    kind: Annotated[TaskKind, typer.Option(help="Fixed choices, or choices that come with each input.")] = "classification",
    template: Annotated[str | None, typer.Option(help="Prompt with {input} and, for multiple choice, {choices}.")] = None,
    chat: Annotated[bool, typer.Option(help="Wrap the prompt in the tokenizer's chat template.")] = False,
    choice_prefix: Annotated[
        str | None, typer.Option(help="Text between prompt and choice (a space; none in a chat).")
    ] = None,
    r: Annotated[int | None, typer.Option(help="Rank: stochastic scalars per adapted layer.  \\[default: 8]")] = None,
    lora_alpha: Annotated[float | None, typer.Option(help="Alpha; the scaling is alpha / r.  \\[default: 16]")] = None,
    target_modules: Annotated[
        str | None, typer.Option(help="Comma-separated module names.  \\[default: q_proj,v_proj,lm_head]")
    ] = None,
    layers_to_transform: Annotated[str | None, typer.Option(help="Comma-separated layer indices (default: all).")] = None,
    init_from: Annotated[
        Path | None,
        typer.Option(help="Start from a finished PEFT LoRA directory; sigma starts at up to --std-init times each mu."),
    ] = None,
    prior_std: Annotated[float, typer.Option(help="Standard deviation of the prior p(s).")] = 1.0,
    base_model_name: Annotated[str | None, typer.Option(help="Name to record in the adapter (default: --model).")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, … (auto: a GPU when there is one).")] = "auto",
) -> None:
    """Train an adapter with stochastic variational inference."""
    for name, given in (
        ("--r", r),
        ("--lora-alpha", lora_alpha),
        ("--target-modules", target_modules),
        ("--layers-to-transform", layers_to_transform),
    ):
        if init_from is not None and given is not None:
            raise typer.BadParameter("the LoRA of --init-from decides this; leave it out", param_hint=name)
    with errors_as_messages():
        from scalabl.base.pretrained import load_pretrained, load_skeleton
        from scalabl.config import AdapterConfig
        from scalabl.evaluation.dataset import read_examples
        from scalabl.evaluation.encoded import encode_examples
        from scalabl.files.peft_import import adapter_of, read_peft
        from scalabl.prompt import Prompter
        from scalabl.training.trainer import train_adapter

        training_rows, validation_rows = read_examples(train), read_examples(validation)
        choices = training_rows[0].choices
        if kind == "multiple_choice":
            choices = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: max(len(row.choices) for row in training_rows)])
        lora = read_peft(init_from) if init_from is not None else None
        with usage_errors():
            config = AdapterConfig(
                base_model_name_or_path=base_model_name or model,
                r=8 if r is None else r,
                lora_alpha=16.0 if lora_alpha is None else lora_alpha,
                target_modules=split(target_modules or "q_proj,v_proj,lm_head"),
                layers_to_transform=split(layers_to_transform) if layers_to_transform else None,
                prior_std=prior_std,
                task=task_of(kind, template, chat, choice_prefix, choices),
            )
        pretrained = load_pretrained(model, device=device, dtype="float32")
        prompter = Prompter(config.task, pretrained.tokenizer)
        config, start = config.model_copy(update={"task": prompter.resolved_task}), None
        if lora is not None:
            kept = {"base_model_name_or_path": config.base_model_name_or_path, "prior_std": prior_std}
            config, start = adapter_of(lora, load_skeleton(model)[0], config.task, **kept)
        metrics = train_adapter(
            pretrained.model,
            config,
            recipe,
            encode_examples(prompter, training_rows, pretrained.max_tokens),
            encode_examples(prompter, validation_rows, pretrained.max_tokens),
            output,
            start,
        )
        typer.echo(json.dumps(metrics))


app.command("train")(command_for(TrainingConfig, _train))


app.command("evaluate")(evaluate)
app.command("calibrate")(calibrate)


@app.command()
def info(adapter: Annotated[Path, typer.Argument(help="The adapter directory.")]) -> None:
    """Print an adapter's configuration and size, without its base model."""
    with errors_as_messages():
        from scalabl.files.adapter_directory import read_config, read_weights

        config, weights = read_config(adapter), read_weights(adapter)
        stochastic = sum(tensor.numel() for name, tensor in weights.items() if name.endswith(".s_mean"))
        summary = {
            **config.model_dump(mode="json"),
            "adapted_layers": sum(name.endswith(".s_mean") for name in weights),
            "stochastic_parameters": stochastic,
            "additional_parameters": sum(tensor.numel() for tensor in weights.values()),
        }
        typer.echo(json.dumps(summary, indent=2))
