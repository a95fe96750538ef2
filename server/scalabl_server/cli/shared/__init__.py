"""What several subcommands use: their options, the rows they read, their tables, and how they fail. No subcommand."""
