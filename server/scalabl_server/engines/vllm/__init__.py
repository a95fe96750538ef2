"""The engine that uses vLLM servers: client, pool, examination. The base model is not loaded in this process."""
