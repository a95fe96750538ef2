"""`scalabl serve`: starts the server as a process. The server itself is in the other packages."""

from __future__ import annotations

import typer

from scalabl.errors import ScalaBLError
from scalabl_server.cli.shared.options import command_for
from scalabl_server.settings import ServeSettings


def _serve(settings: ServeSettings) -> None:
    """Serve an adapter over HTTP. Each option can also be set by the environment variable shown with it."""
    from scalabl_server import listen
    from scalabl_server.observe import logs

    logs.configure(settings.log_level, settings.log_format)
    failure = listen.run(settings)
    if isinstance(failure, ScalaBLError):
        raise failure
    if failure is not None:
        raise typer.Exit(1)  # already logged with its traceback


serve = command_for(ServeSettings, _serve, env_prefix="SCALABL_")
