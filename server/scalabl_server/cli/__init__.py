"""The `scalabl` command, one module for each group of subcommands. The work itself is done in `scalabl`."""
