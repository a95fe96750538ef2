"""Predictions and the true answers that come back later: stored in a database, counted for `/metrics`."""
