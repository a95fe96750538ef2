"""Runs the `scalabl` command as `python -m scalabl_server.cli`, for environments without the installed script."""

from scalabl_server.cli.main import app

app()
