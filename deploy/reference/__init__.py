"""docs/reference.md: every flag, error and metric of the server. `python -m deploy.reference` writes it."""
