"""The decisions that an adapter adds to a prediction: the prediction set, and whether and why to abstain."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scalabl.config import AdapterConfig, Calibration
from scalabl.uncertainty.conformal import prediction_sets
from scalabl.uncertainty.predictive import Predictive
from scalabl.uncertainty.selective import doubt
from scalabl_server.schemas.prediction import AbstainReason, InputNovelty, PredictionSet


def decisions(
    outcome: Predictive,
    choices: Sequence[str],
    config: AdapterConfig,
    level: str | None,
    novelty: InputNovelty | None = None,
) -> dict[str, Any]:
    """The fields `prediction_set`, `novelty`, `abstain` and `abstain_reason` of one input.

    Args:
        outcome: of this input alone: tensors without a batch dimension.
        level: the calibrated coverage, a key of `calibration.levels`; None if the adapter is not calibrated, or not for the
            settings of this request.
        novelty: of this input; None if the adapter has no novelty reference.
    """
    calibration = config.calibration
    applies = calibration is not None and level is not None
    uncertain = _is_uncertain(outcome, calibration) if applies else None
    novel = None
    if novelty is not None and novelty.p_value is not None and config.novelty_level is not None:
        novel = novelty.p_value <= config.novelty_level
    judgements: dict[AbstainReason, bool | None] = {"uncertain": uncertain, "novel": novel}
    reasons = [reason for reason, holds in judgements.items() if holds]
    # Where the rule for uncertainty does not apply to this request, nobody knows that the answer is good enough.
    unknown = calibration is not None and calibration.abstain is not None and not applies
    nothing_known = unknown or all(holds is None for holds in judgements.values())
    return {
        "prediction_set": _prediction_set(outcome, choices, calibration, level),
        "novelty": novelty,
        "abstain": True if reasons else None if nothing_known else False,
        "abstain_reason": reasons,
    }


def _is_uncertain(outcome: Predictive, calibration: Calibration | None) -> bool | None:
    """Whether the doubt score is above the calibrated threshold; None without one."""
    if calibration is None or calibration.abstain is None:
        return None
    return float(doubt(outcome, calibration.abstain.score)) > calibration.abstain.threshold


def _prediction_set(
    outcome: Predictive, choices: Sequence[str], calibration: Calibration | None, level: str | None
) -> PredictionSet | None:
    if calibration is None or level is None:
        return None
    threshold = calibration.levels[level]
    members = prediction_sets(outcome.probabilities, calibration.method, threshold, keep_top=False).tolist()
    probabilities = outcome.probabilities.tolist()
    order = sorted(range(len(choices)), key=probabilities.__getitem__, reverse=True)  # stable among equals
    labels = [choices[index] for index in order if members[index] or index == order[0]]
    return PredictionSet(labels=labels, coverage=float(level), method=calibration.method)
