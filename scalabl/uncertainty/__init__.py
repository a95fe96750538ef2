"""From logits to uncertainty: predictive, linearised predictive, adaptive sampling, prediction sets, abstention.

Reading files is in `files`, working on whole data sets in `evaluation`.
"""
