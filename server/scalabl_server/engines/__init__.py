"""Engines, which compute logits: the interface, transformers in this process, and vLLM servers. The queue: `batching`."""
