"""Stochastic variational inference: the recipe, the loss and the trainer. Scores are computed in `evaluation`."""
