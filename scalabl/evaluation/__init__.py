"""Work on labelled data: reading, running an adapter, scores, calibration, reports, plots. Training is in `training`."""
