"""A real server under load: latency, saturation, memory. What the passes themselves cost is in `benchmarks.serving`."""
