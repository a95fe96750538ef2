"""What a pass with K samples costs, beside its peers and with each shortcut. A whole server is in `benchmarks.load`."""
