"""`scalabl export`: an adapter's posterior samples as LoRAs for other projects. The other way is `convert`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scalabl.model.posterior import DEFAULT_SCHEME, Scheme
from scalabl_server.cli.options import errors_as_messages

export = typer.Typer(help="Write an adapter in another project's format.", no_args_is_help=True)

Adapter = Annotated[Path, typer.Option(help="The adapter directory.")]
ShapesOf = Annotated[
    str | None, typer.Option(help="Base model, of which only the shapes are read (default: the adapter's).")
]


@export.command("peft")
def export_peft_command(
    adapter: Adapter,
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
    adapter: Adapter,
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
