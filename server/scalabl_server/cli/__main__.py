"""`python -m scalabl_server.cli`: the `scalabl` command where no script is installed."""

from scalabl_server.cli.main import app

app()
