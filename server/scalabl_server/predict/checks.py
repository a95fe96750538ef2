"""Whether a request's method, samples and coverage go together, with each other and with the adapter's calibration."""

from __future__ import annotations

from typing import Literal

from scalabl.config import Calibration
from scalabl.model.posterior import Scheme
from scalabl.uncertainty.adaptive import Rule
from scalabl_server.methods import Method
from scalabl_server.problems import ProblemError
from scalabl_server.schemas.prediction import PredictRequest


def check_method(request: PredictRequest) -> None:
    """Refuse what a request's method has no use for.

    Raises:
        ProblemError: `invalid-field`.
    """
    if request.num_samples != "auto":
        for field in ("target", "tolerance"):
            if getattr(request, field) is not None:
                raise ProblemError(
                    "invalid-field", "it goes with num_samples 'auto'; leave it out, or send that too", field=field
                )
    if request.method == "linearized":
        for field in ("num_samples", "seed", "return_samples"):
            value = getattr(request, field)
            if value is not None and value is not False:
                raise ProblemError(
                    "invalid-field", "the linearized method draws no samples; leave the field out", field=field
                )
    elif request.explain and request.method == "monte_carlo":
        raise ProblemError(
            "invalid-field",
            "samples alone do not tell layers apart; send the method 'linearized' or 'control_variate'",
            field="explain",
        )


def rule_of(request: PredictRequest, max_samples: int) -> Rule | None:
    """When to stop drawing samples, where the request leaves that to the server.

    Raises:
        ProblemError: `invalid-field`.
    """
    if request.num_samples != "auto":
        return None
    if request.method != "monte_carlo":
        raise ProblemError("invalid-field", "'auto' is for the method monte_carlo; send a number", field="num_samples")
    target, most = request.target or Rule.target, min(Rule.most, max_samples)
    if target == "decision" and request.tolerance is not None and request.tolerance >= 1:
        raise ProblemError(
            "invalid-field", "for the target decision it is a probability; send one below 1", field="tolerance"
        )
    return Rule(target, request.tolerance, min(Rule.first, most), most)


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
                "this adapter is not calibrated; leave the field out, or run `scalabl calibrate` on the adapter",
                field="coverage",
            )
        return None
    if unlike is not None:
        if coverage is not None:
            raise ProblemError(
                "invalid-field", f"{unlike}; leave the field out, or ask as it was calibrated", field="coverage"
            )
        return None
    if coverage is None:
        return calibration.default_level
    level = f"{coverage:g}"
    if level not in calibration.levels:
        raise ProblemError(
            "invalid-field",
            f"{level} was not calibrated; this adapter has {', '.join(calibration.levels)}",
            field="coverage",
        )
    return level
