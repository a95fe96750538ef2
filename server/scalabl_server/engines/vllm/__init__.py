"""The engine that asks vLLM servers: client, pool, examination. Nothing of the base model is in this process."""
