"""Which passes to run, and which shortcuts they take: start-up probes, prefix cache, grouping, rounds.

How a single pass works is in `model`.
"""
