"""Generates docs/reference.md, which lists every flag, error and metric of the server. Run `python -m deploy.reference`."""
