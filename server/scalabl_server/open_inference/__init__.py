"""The Open Inference Protocol, version 2: its routes, and its tensors as requests and answers of `predict`."""
