"""What computes logits: the interface, transformers in this process, and vLLM servers. The queue is in `batching`."""
