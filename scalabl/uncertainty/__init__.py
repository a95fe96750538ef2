"""From logits to uncertainty: predictive, linearised predictive, adaptive sampling, prediction sets, abstention.

Files and data sets are in `files` and `evaluation`.
"""
