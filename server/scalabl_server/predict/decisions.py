"""What a calibrated adapter adds to a prediction: a set with its coverage, and whether to abstain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from scalabl.config import Calibration
from scalabl.model.posterior import Scheme
from scalabl.uncertainty.conformal import prediction_sets
from scalabl.uncertainty.predictive import Predictive
from scalabl.uncertainty.selective import doubt
from scalabl_server.problems import ProblemError
from scalabl_server.schemas import Method, PredictionSet


def uncalibrated(
    calibration: Calibration | None, method: Method, num_samples: int | Literal["auto"], seed: int, scheme: Scheme
) -> str | None:
    """Why an answer's set and abstention cannot be had: thresholds hold for the predictive that they were found with."""
    if calibration is None:
        return None
    wanted = {
        "method": (method, "monte_carlo"),
        "num_samples": (num_samples, calibration.num_samples),
        "seed": (seed, calibration.seed),
        "draw_scheme": (scheme, calibration.draw_scheme),
    }
    if method != "monte_carlo":
        wanted = {"method": wanted["method"]}
    differing = [f"{name} {given} (calibrated with {known})" for name, (given, known) in wanted.items() if given != known]
    if not differing:
        return None
    return f"prediction_set and abstain are null: this answer has {', '.join(differing)}"


def level_for(calibration: Calibration | None, coverage: float | None, unlike: str | None) -> str | None:
    """The calibrated level that a request's `coverage` names, or the default one; None without a calibration that holds.

    Args:
        unlike: what `uncalibrated` says.

    Raises:
        ProblemError: `invalid-field`, for a coverage that was not calibrated.
    """
    if calibration is None:
        if coverage is not None:
            raise ProblemError(
                "invalid-field",
                "coverage: this adapter is not calibrated; leave the field out, or run `scalabl calibrate` on the adapter",
            )
        return None
    if unlike is not None:
        if coverage is not None:
            raise ProblemError("invalid-field", f"coverage: {unlike}; leave the field out, or ask as it was calibrated")
        return None
    if coverage is None:
        return calibration.default_level
    level = f"{coverage:g}"
    if level not in calibration.levels:
        raise ProblemError(
            "invalid-field", f"coverage: {level} was not calibrated; this adapter has {', '.join(calibration.levels)}"
        )
    return level


def decisions(
    outcome: Predictive, choices: Sequence[str], calibration: Calibration | None, level: str | None
) -> dict[str, Any]:
    """`prediction_set` and `abstain` of one input: tensors without leading dimensions. Both None without a calibration."""
    if calibration is None or level is None:
        return {"prediction_set": None, "abstain": None}
    threshold = calibration.levels[level]
    members = prediction_sets(outcome.probabilities, calibration.method, threshold, keep_top=False).tolist()
    probabilities = outcome.probabilities.tolist()
    order = sorted(range(len(choices)), key=probabilities.__getitem__, reverse=True)  # equal ones as they come
    labels = [choices[index] for index in order if members[index] or index == order[0]]
    rule = calibration.abstain
    return {
        "prediction_set": PredictionSet(labels=labels, coverage=float(level), method=calibration.method),
        "abstain": None if rule is None else float(doubt(outcome, rule.score)) > rule.threshold,
    }
