"""`scalabl export`: writes posterior samples of an adapter as LoRAs for other projects. `convert` does the opposite."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scalabl.model.posterior import DEFAULT_SCHEME, Scheme
from scalabl_server.cli.shared.options import LARGEST_SEED, MOST_SAMPLES

export = typer.Typer(help="Write an adapter in another project's format.", no_args_is_help=True)

Adapter = Annotated[Path, typer.Option(help="The adapter directory.")]
ShapesOf = Annotated[
    str | None,
    typer.Option(help="Base model. Only its tensor shapes are read (default: the base model that the adapter names)."),
]


@export.command("peft")
def export_peft_command(
    adapter: Adapter,
    output: Annotated[Path, typer.Option(help="The folder to create, with one LoRA directory per sample.")],
    num_samples: Annotated[
        int, typer.Option(min=1, max=MOST_SAMPLES, help="Number of posterior samples (K); each becomes a LoRA.")
    ] = 8,
    model: ShapesOf = None,
    seed: Annotated[int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the posterior samples.")] = 0,
    draw_scheme: Annotated[Scheme, typer.Option(help="How posterior samples are drawn.")] = DEFAULT_SCHEME,
) -> None:
    """Write K posterior samples as K LoRA directories that PEFT can load."""
    from scalabl.base.pretrained import load_skeleton
    from scalabl.files.adapter_directory import read_config
    from scalabl.files.peft_export import export_peft

    skeleton, _ = load_skeleton(model or read_config(adapter).base_model_name_or_path)
    names = export_peft(adapter, output, skeleton, num_samples=num_samples, seed=seed, scheme=draw_scheme)
    typer.echo(f"wrote {output}: {names[0]} … {names[-1]}" if len(names) > 1 else f"wrote {output}: {names[0]}")


@export.command("vllm")
def export_vllm_command(
    adapter: Adapter,
    output: Annotated[Path, typer.Option(help="The folder to add LoRAs to. vLLM must see it under the same path.")],
    num_samples: Annotated[
        int, typer.Option(min=1, max=MOST_SAMPLES, help="Number of posterior samples (K): the --max-samples of the server.")
    ] = 16,
    model: ShapesOf = None,
    seed: Annotated[
        int, typer.Option(min=0, max=LARGEST_SEED, help="Seed of the posterior samples: the --seed of the server.")
    ] = 0,
    draw_scheme: Annotated[
        Scheme, typer.Option(help="How posterior samples are drawn: the --draw-scheme of the server.")
    ] = DEFAULT_SCHEME,
) -> None:
    """Write the LoRAs that vLLM serves for `scalabl serve --engine vllm`, so that none is loaded at run time.

    Prints the arguments for vLLM's --lora-modules, one name=folder per line.
    """
    from scalabl.base.pretrained import load_skeleton
    from scalabl.files.adapter_directory import read_config
    from scalabl.files.sample_loras import SampleLoras

    skeleton, _ = load_skeleton(model or read_config(adapter).base_model_name_or_path)
    loras = SampleLoras.read(adapter, skeleton, num_samples=num_samples, seed=seed, scheme=draw_scheme)
    for name in loras.all_names:
        typer.echo(f"{name}={loras.write(output, name).absolute()}")
