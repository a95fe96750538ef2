"""The queue in front of the model: admission, choosing the next batch, running it, and handling failed passes."""
