"""`scalabl info`: shows what an adapter directory contains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from scalabl_server.cli.options import errors_as_messages


def info(adapter: Annotated[Path, typer.Argument(help="The adapter directory.")]) -> None:
    """Print an adapter's configuration and size as JSON. The base model is not needed."""
    with errors_as_messages():
        from scalabl.files.adapter_directory import read_config, read_weights

        config, weights = read_config(adapter), read_weights(adapter)
        stochastic = sum(tensor.numel() for name, tensor in weights.items() if name.endswith(".s_mean"))
        task = config.task
        summary = {
            **config.model_dump(mode="json"),
            "token_of_each_choice": dict(zip(task.choices, task.choice_tokens, strict=True)) if task.choice_tokens else None,
            "adapted_layers": sum(name.endswith(".s_mean") for name in weights),
            "stochastic_parameters": stochastic,
            "additional_parameters": sum(tensor.numel() for tensor in weights.values()),
        }
        typer.echo(json.dumps(summary, indent=2))
