"""All that is measured on a GPU, in one command, on a machine that has one for minutes. `run.sh` says how to call it."""
