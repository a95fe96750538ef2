"""Checks that a request's method, samples and coverage fit each other and the adapter's calibration."""

from __future__ import annotations

from typing import Literal

from scalabl.config import Calibration
from scalabl.model.posterior import Scheme
from scalabl.uncertainty.adaptive import Rule
from scalabl_server.methods import Method
from scalabl_server.problems import ProblemError
from scalabl_server.schemas.prediction import PredictRequest


def check_method(request: PredictRequest) -> None:
    """Refuse fields that the request's method does not use.

    Raises:
        ProblemError: `invalid-field`.
    """
    if request.num_samples != "auto":
        for field in ("target", "tolerance"):
            if getattr(request, field) is not None:
                raise ProblemError(
                    "invalid-field",
                    "the field is only for num_samples 'auto'; leave it out, or set num_samples to 'auto'",
                    field=field,
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
            "the method monte_carlo cannot attribute the variance to layers; use the method linearized or control_variate",
            field="explain",
        )


def rule_of(request: PredictRequest, max_samples: int, members: int) -> Rule | None:
    """The rule for when to stop drawing samples, if the request has num_samples 'auto'; otherwise None.

    The first round has two samples or more of each member of the adapter, as many of one as of another.

    Raises:
        ProblemError: `invalid-field`.
    """
    if request.num_samples != "auto":
        return None
    if request.method != "monte_carlo":
        raise ProblemError(
            "invalid-field", "'auto' is only for the method monte_carlo; send a number instead", field="num_samples"
        )
    target, most = request.target or Rule.target, min(Rule.most, max_samples)
    if target == "decision" and request.tolerance is not None and request.tolerance >= 1:
        raise ProblemError(
            "invalid-field",
            f"{request.tolerance:g} is not below 1; for the target decision the tolerance is a probability",
            field="tolerance",
        )
    first = -(-max(Rule.first, 2 * members) // members) * members
    return Rule(target, request.tolerance, min(first, most), most)


def calibration_mismatch(
    calibration: Calibration | None,
    method: Method,
    num_samples: int | Literal["auto"],
    seed: int,
    scheme: Scheme,
    *,
    restricted: bool = False,
) -> str | None:
    """Why the calibrated thresholds do not apply to a request; None if they do, or if there are none.

    The thresholds hold only for predictions that are computed in the same way as those of the calibration, over all choices.

    Args:
        restricted: the request is restricted to some of the adapter's choices.
    """
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
    differing = [
        f"{name} {requested} (calibrated with {calibrated})"
        for name, (requested, calibrated) in wanted.items()
        if requested != calibrated
    ]
    if restricted:
        differing.append("choices (calibrated with all of the adapter's)")
    if not differing:
        return None
    return f"prediction_set and abstain are null, because this request uses {', '.join(differing)}"


def level_for(calibration: Calibration | None, coverage: float | None, mismatch: str | None) -> str | None:
    """The calibrated level for a request's `coverage`, or the default level; None if there is no applicable calibration.

    Args:
        mismatch: the result of `calibration_mismatch`.

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
    if mismatch is not None:
        if coverage is not None:
            raise ProblemError(
                "invalid-field",
                f"{mismatch}; leave the field out, or use the settings of the calibration",
                field="coverage",
            )
        return None
    if coverage is None:
        return calibration.default_level
    level = f"{coverage:g}"
    if level not in calibration.levels:
        raise ProblemError(
            "invalid-field",
            f"{level} was not calibrated; use one of {', '.join(calibration.levels)}",
            field="coverage",
        )
    return level
