"""From logits to uncertainty: predictive, linearised predictive, adaptive sampling, prediction sets, abstention.

Nothing here reads files or runs over a data set: that is in `files` and `evaluation`.
"""
