"""`scalabl info` shows what an adapter directory contains, `scalabl combine` makes one out of several. No base model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def info(adapter: Annotated[Path, typer.Argument(help="The adapter directory.")]) -> None:
    """Print an adapter's configuration and size as JSON. The base model is not needed."""
    from scalabl.files.adapter_directory import read_config, read_weights

    config, weights = read_config(adapter), read_weights(adapter)
    stochastic = sum(tensor.numel() for name, tensor in weights.items() if name.endswith(".s_mean"))
    task = config.task
    summary = {
        **config.model_dump(mode="json"),
        "members": config.members,
        "token_of_each_choice": dict(zip(task.choices, task.choice_tokens, strict=True)) if task.choice_tokens else None,
        "adapted_layers": sum(name.endswith(".s_mean") for name in weights),
        "stochastic_parameters": stochastic,
        "additional_parameters": sum(tensor.numel() for tensor in weights.values()),
    }
    typer.echo(json.dumps(summary, indent=2))


def combine(
    adapters: Annotated[list[Path], typer.Argument(help="The adapter directories, two or more.")],
    output: Annotated[Path, typer.Option(help="The adapter directory to write.")],
    overwrite: Annotated[bool, typer.Option(help="Replace the adapter in --output, once the new one is complete.")] = False,
) -> None:
    """Combine adapters of one base model and task into a mixture, whose members they become.

    They must agree in base model, target modules, layers, rank, alpha and task. Calibrate the mixture afterwards.
    """
    from scalabl.files.adapter_directory import read_config
    from scalabl.files.combination import combine as run
    from scalabl.files.combination import is_calibrated

    config = run(adapters, output, overwrite=overwrite)
    calibrated = [str(folder) for folder in adapters if is_calibrated(read_config(folder))]
    if calibrated:
        typer.echo(
            f"note: calibration and novelty of {', '.join(calibrated)} do not hold for the mixture and were left out; "
            "run `scalabl calibrate` on it, with --reference for novelty",
            err=True,
        )
    typer.echo(f"wrote {output}: a mixture of {config.members} members")
