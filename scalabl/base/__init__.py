"""The base model without adapters: loading, devices, precision, memory. Adapters are attached in `model`."""
