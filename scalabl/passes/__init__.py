"""Which passes to run, and what they may leave out: start-up probes, prefix cache, grouping, rounds.

How a single pass works is in `model`.
"""
