"""The answer to a request: computes the JSON of each prediction from the results of the passes."""

from __future__ import annotations

import heapq
import math
import uuid
from collections.abc import Sequence
from typing import Any

from scalabl.config import AdapterConfig
from scalabl.uncertainty.linearized import SPREAD_LIMIT
from scalabl.uncertainty.predictive import Predictive
from scalabl_server.batching.jobs import Job, Result
from scalabl_server.engines.interface import Served
from scalabl_server.predict.decisions import decisions
from scalabl_server.predict.request import CheckedRequest
from scalabl_server.problems import ProblemError
from scalabl_server.schemas.prediction import Prediction, StandardError

SMALL = 4096  # logits (samples x choices); processing that many takes less than half a millisecond


def is_small(jobs: Sequence[Job], results: Sequence[Result]) -> bool:
    """Whether `answers_of` is faster than handing it to another thread: true for one input with few samples."""
    return len(results) == 1 and jobs[0].values_to_read(results[0]) <= SMALL


def answers_of(
    jobs: Sequence[Job], results: Sequence[Result], checked: CheckedRequest, config: AdapterConfig
) -> tuple[list[Predictive], list[Prediction]]:
    """The predictive distribution of each input and its JSON. Call it on another thread than the event loop's, unless it
    `is_small`.

    Raises:
        ProblemError: `internal-error`, for logits that are not finite.
    """
    outcomes = []
    for position, (job, result) in enumerate(zip(jobs, results, strict=True)):
        if not result.is_finite:
            raise ProblemError(
                "internal-error",
                f"the model computed logits that are not finite for inputs.{position}; its adapter may be damaged",
            )
        outcomes.append(job.outcome(result, config.temperature))
    return [outcome for outcome, _ in outcomes], [
        prediction_of(outcome, names, checked, shares, decisions(outcome, names, config.calibration, checked.level))
        for (outcome, shares), names in zip(outcomes, checked.choices, strict=True)
    ]


def prediction_of(
    outcome: Predictive, choices: Sequence[str], checked: CheckedRequest, shares: dict[str, float], decided: dict[str, Any]
) -> Prediction:
    """The JSON of one prediction, with a new id.

    Args:
        shares: of the adapted layers in the variance.
        decided: the fields `prediction_set` and `abstain`, from `decisions`.
    """
    probabilities = outcome.probabilities.tolist()
    index = max(range(len(probabilities)), key=probabilities.__getitem__)
    error = outcome.standard_error
    optional: dict[str, Any] = {}  # only in the JSON if the request asks for them
    if checked.return_samples:
        optional["samples"] = [dict(zip(choices, sample, strict=True)) for sample in outcome.sample_probabilities.tolist()]
    if checked.explain:
        optional["layer_shares"] = shares
    return Prediction(
        id=f"pred-{uuid.uuid4().hex}",
        prediction=choices[index],
        index=index,
        confidence=probabilities[index],
        probabilities=dict(zip(choices, probabilities, strict=True)),
        entropy=float(outcome.entropy),
        expected_entropy=float(outcome.expected_entropy),
        mutual_information=float(outcome.mutual_information),
        standard_error=StandardError(
            probabilities=dict(zip(choices, map(_known, error.probabilities.tolist()), strict=True)),
            entropy=_known(float(error.entropy)),
            expected_entropy=_known(float(error.expected_entropy)),
            mutual_information=_known(float(error.mutual_information)),
        ),
        num_samples=0 if checked.method == "linearized" else len(outcome.sample_probabilities),
        method=checked.method,
        recorded=True,
        **decided,
        **optional,
    )


def cut(prediction: Prediction, top_k: int | None) -> Prediction:
    """The prediction with the probabilities of its `top_k` most probable choices only; itself if `top_k` is None.

    Standard errors and samples have the same choices. The prediction set stays whole.
    """
    if top_k is None:
        return prediction
    kept = dict(heapq.nlargest(top_k, prediction.probabilities.items(), key=lambda item: item[1]))  # stable among equals
    errors = prediction.standard_error
    fields: dict[str, Any] = {
        "probabilities": kept,
        "other": math.fsum(p for name, p in prediction.probabilities.items() if name not in kept),
        "standard_error": errors.model_copy(update={"probabilities": {name: errors.probabilities[name] for name in kept}}),
    }
    if prediction.samples is not None:
        fields["samples"] = [{name: sample[name] for name in kept} for sample in prediction.samples]
    return prediction.model_copy(update=fields)


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def warnings_of(served: Served, checked: CheckedRequest) -> list[str]:
    """Warnings for the client: that linearisation is inaccurate for this adapter, and why `prediction_set` and `abstain` are
    null although the adapter is calibrated."""
    warnings = []
    if checked.method == "linearized" and served.relative_spread > SPREAD_LIMIT:
        spread = f"its median sigma / |mu| is {served.relative_spread:.2g}, above the limit of {SPREAD_LIMIT:g}"
        warnings.append(
            f"the linearized method is biased for the adapter {served.name!r}: {spread}; use monte_carlo instead"
        )
    if checked.calibration_mismatch is not None:
        warnings.append(checked.calibration_mismatch)
    return warnings
