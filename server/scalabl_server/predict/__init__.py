"""The path of a `/predict` request: parsed request, jobs, answers. The queue is in `batching`, the model in `engines`."""
