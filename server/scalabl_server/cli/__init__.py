"""The `scalabl` command, one module per subcommand. Only options, messages and tables; the work itself is in `scalabl`."""
