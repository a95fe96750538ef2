"""The decisions that a calibrated adapter adds to a prediction: the prediction set, and whether to abstain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scalabl.config import Calibration
from scalabl.uncertainty.conformal import prediction_sets
from scalabl.uncertainty.predictive import Predictive
from scalabl.uncertainty.selective import doubt
from scalabl_server.schemas.prediction import PredictionSet


def decisions(
    outcome: Predictive, choices: Sequence[str], calibration: Calibration | None, level: str | None
) -> dict[str, Any]:
    """The fields `prediction_set` and `abstain` of one input; both None without a calibration.

    Args:
        outcome: of this input alone: tensors without a batch dimension.
        level: the calibrated coverage, a key of `calibration.levels`.
    """
    if calibration is None or level is None:
        return {"prediction_set": None, "abstain": None}
    threshold = calibration.levels[level]
    members = prediction_sets(outcome.probabilities, calibration.method, threshold, keep_top=False).tolist()
    probabilities = outcome.probabilities.tolist()
    order = sorted(range(len(choices)), key=probabilities.__getitem__, reverse=True)  # stable among equals
    labels = [choices[index] for index in order if members[index] or index == order[0]]
    rule = calibration.abstain
    return {
        "prediction_set": PredictionSet(labels=labels, coverage=float(level), method=calibration.method),
        "abstain": None if rule is None else float(doubt(outcome, rule.score)) > rule.threshold,
    }
