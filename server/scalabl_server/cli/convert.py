"""The commands that turn other projects' checkpoints into adapters, and adapters into theirs: `convert` and `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scalabl.config import TaskKind
from scalabl.model.posterior import DEFAULT_SCHEME, Scheme
from scalabl_server.cli.options import errors_as_messages, split, task_of, usage_errors

convert = typer.Typer(help="Make an adapter directory from another project's checkpoint.", no_args_is_help=True)
export = typer.Typer(help="Write an adapter in another project's format.", no_args_is_help=True)

Output = Annotated[Path, typer.Option(help="The adapter directory to write.")]
Kind = Annotated[TaskKind, typer.Option(help="Fixed choices, or choices that come with each input.")]
Chat = Annotated[bool, typer.Option(help="Wrap the prompt in the tokenizer's chat template.")]
ChoicePrefix = Annotated[str | None, typer.Option(help="Text between prompt and choice (a space; none in a chat).")]
Choices = Annotated[str, typer.Option(help="Comma-separated choices, in their order.")]


@convert.command("bayesadapt")
def convert_bayesadapt_command(
    checkpoint: Annotated[Path, typer.Option(help="The authors' state_dict.pt; read without unpickling code.")],
    base_model: Annotated[str, typer.Option(help="Name of the base model to record.")],
    lora_alpha: Annotated[float, typer.Option(help="LoRA alpha of their run.")],
    choices: Choices,
    choice_tokens: Annotated[str, typer.Option(help="Comma-separated token ids, one per choice.")],
    output: Output,
    kind: Kind = "multiple_choice",
    template: Annotated[str | None, typer.Option(help="Prompt (default: their multiple-choice prompt).")] = None,
    chat: Chat = False,
    choice_prefix: ChoicePrefix = None,
) -> None:
    """Convert a ScalaBL checkpoint of the authors' code (BayesAdapt)."""
    with errors_as_messages():
        from scalabl.files.bayesadapt import convert_bayesadapt

        with usage_errors():
            task = task_of(kind, template, chat, choice_prefix, split(choices), split(choice_tokens))
        config = convert_bayesadapt(checkpoint, output, base_model=base_model, lora_alpha=lora_alpha, task=task)
        typer.echo(f"wrote {output}: rank {config.r}, target modules {', '.join(config.target_modules)}")


@convert.command("peft")
def convert_peft_command(
    peft: Annotated[Path, typer.Option(help="A LoRA directory that PEFT saved.")],
    model: Annotated[str, typer.Option(help="Its base model, of which only the tokenizer and the shapes are read.")],
    choices: Choices,
    output: Output,
    kind: Kind = "classification",
    template: Annotated[str | None, typer.Option(help="Prompt that the LoRA was trained with.")] = None,
    chat: Chat = False,
    choice_prefix: ChoicePrefix = None,
    relative_sigma: Annotated[
        float,
        typer.Option(min=1e-6, help="sigma as a share of each mu; `scalabl calibrate` then scales it."),
    ] = 0.1,
    base_model_name: Annotated[str | None, typer.Option(help="Name to record in the adapter (default: --model).")] = None,
) -> None:
    """Make a finished PEFT LoRA Bayesian: its product B A becomes the posterior mean, exactly."""
    with errors_as_messages():
        from scalabl.base.pretrained import load_skeleton
        from scalabl.files.peft_import import convert_peft
        from scalabl.prompt import Prompter

        with usage_errors():
            task = task_of(kind, template, chat, choice_prefix, split(choices))
        skeleton, tokenizer = load_skeleton(model)
        config = convert_peft(
            peft,
            output,
            skeleton,
            base_model=base_model_name or model,
            task=Prompter(task, tokenizer).resolved_task,
            relative_std=relative_sigma,
        )
        typer.echo(f"wrote {output}: rank {config.r}, target modules {', '.join(config.target_modules)}")


ExportedAdapter = Annotated[Path, typer.Option(help="The adapter directory.")]
ShapesOf = Annotated[
    str | None, typer.Option(help="Base model, of which only the shapes are read (default: the adapter's).")
]


@export.command("peft")
def export_peft_command(
    adapter: ExportedAdapter,
    output: Annotated[Path, typer.Option(help="The folder to make, with one LoRA directory for each sample.")],
    num_samples: Annotated[int, typer.Option(min=1, help="K, posterior samples, each its own LoRA.")] = 8,
    model: ShapesOf = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 0,
    draw_scheme: Annotated[Scheme, typer.Option(help="How they are drawn.")] = DEFAULT_SCHEME,
) -> None:
    """Write K posterior samples as K LoRA directories that PEFT loads."""
    with errors_as_messages():
        from scalabl.base.pretrained import load_skeleton
        from scalabl.files.adapter_directory import read_config
        from scalabl.files.peft_export import export_peft

        skeleton, _ = load_skeleton(model or read_config(adapter).base_model_name_or_path)
        names = export_peft(adapter, output, skeleton, num_samples=num_samples, seed=seed, scheme=draw_scheme)
        typer.echo(f"wrote {output}: {names[0]} … {names[-1]}" if len(names) > 1 else f"wrote {output}: {names[0]}")


@export.command("vllm")
def export_vllm_command(
    adapter: ExportedAdapter,
    output: Annotated[Path, typer.Option(help="The folder of LoRAs to add to; vLLM must read it under the same path.")],
    num_samples: Annotated[int, typer.Option(min=1, help="K, posterior samples: the server's --max-samples.")] = 16,
    model: ShapesOf = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws: the server's --seed.")] = 0,
    draw_scheme: Annotated[Scheme, typer.Option(help="How they are drawn: the server's --draw-scheme.")] = DEFAULT_SCHEME,
) -> None:
    """Write what vLLM needs to answer for `scalabl serve --engine vllm` without loading LoRAs at run time.

    Prints the arguments of its --lora-modules, one name=folder a line.
    """
    with errors_as_messages():
        from scalabl.base.pretrained import load_skeleton
        from scalabl.files.adapter_directory import read_config
        from scalabl.files.sample_loras import SampleLoras

        skeleton, _ = load_skeleton(model or read_config(adapter).base_model_name_or_path)
        loras = SampleLoras.read(adapter, skeleton, num_samples=num_samples, seed=seed, scheme=draw_scheme)
        for name in loras.all_names:
            typer.echo(f"{name}={loras.write(output, name).absolute()}")
