"""The path of a `/predict` request: checks, jobs, answers. The queue is in `batching`, the model in `engines`."""
