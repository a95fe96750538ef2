"""Labelled data: reading it, running an adapter over it, scores, calibration, reports, plots. Training is in `training`."""
