"""Training by stochastic variational inference: settings, loss and trainer. Scores are computed in `evaluation`."""
