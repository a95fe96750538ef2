"""The `scalabl` command and the list of its subcommands. Each subcommand imports torch and the like only when it runs.

What a subcommand raises becomes one line and an exit status in `failures`.
"""

from __future__ import annotations

from typing import Annotated

import typer

from scalabl import __version__
from scalabl_server.cli.adapter_folders import combine, info
from scalabl_server.cli.calibrate import calibrate
from scalabl_server.cli.convert import convert
from scalabl_server.cli.evaluate import evaluate
from scalabl_server.cli.export import export
from scalabl_server.cli.failures import Commands
from scalabl_server.cli.fit import fit
from scalabl_server.cli.serve import serve
from scalabl_server.cli.train import train

app = typer.Typer(
    cls=Commands,
    help="Inference server and tools for ScalaBL, Bayesian low-rank adapters.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(convert, name="convert")
app.add_typer(export, name="export")
app.command("serve")(serve)
app.command("train")(train)
app.command("fit")(fit)
app.command("evaluate")(evaluate)
app.command("calibrate")(calibrate)
app.command("combine")(combine)
app.command("info")(info)


def _version(is_requested: bool) -> None:
    if is_requested:
        typer.echo(f"scalabl {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Inference server and tools for ScalaBL, Bayesian low-rank adapters."""
