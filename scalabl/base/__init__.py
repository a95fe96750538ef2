"""The base model before any adapter: loading, devices, precision, memory. Nothing here knows of adapters."""
