"""From what the passes gave for each input to the JSON that answers the request."""

from __future__ import annotations

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
from scalabl_server.predict.request import Asked
from scalabl_server.problems import ProblemError
from scalabl_server.schemas.prediction import Prediction, StandardError

SMALL = 4096  # logits (samples x choices), which take a few tenths of a millisecond


def is_small(jobs: Sequence[Job], results: Sequence[Result]) -> bool:
    """Whether `answers_of` takes less time than a change of thread and back: for one input with few samples."""
    return len(results) == 1 and jobs[0].values_to_read(results[0]) <= SMALL


def answers_of(
    jobs: Sequence[Job], results: Sequence[Result], asked: Asked, config: AdapterConfig
) -> tuple[list[Predictive], list[Prediction]]:
    """What the pass's result for each input comes to, and its JSON. Belongs off the event loop, unless it `is_small`.

    Raises:
        ProblemError: `internal-error`, for logits that are not finite.
    """
    outcomes = []
    for position, (job, result) in enumerate(zip(jobs, results, strict=True)):
        if not result.is_finite:
            raise ProblemError(
                "internal-error", f"the model gave inputs.{position} logits that are not finite; its adapter may be damaged"
            )
        outcomes.append(job.outcome(result, config.temperature))
    return [outcome for outcome, _ in outcomes], [
        prediction_of(outcome, names, asked, shares, decisions(outcome, names, config.calibration, asked.level))
        for (outcome, shares), names in zip(outcomes, asked.choices, strict=True)
    ]


def prediction_of(
    outcome: Predictive, choices: Sequence[str], asked: Asked, shares: dict[str, float], decided: dict[str, Any]
) -> Prediction:
    """The answer to one input, with an id of its own."""
    probabilities = outcome.probabilities.tolist()
    index = max(range(len(probabilities)), key=probabilities.__getitem__)
    error = outcome.standard_error
    optional: dict[str, Any] = {}  # left out of the JSON unless asked for
    if asked.return_samples:
        optional["samples"] = [dict(zip(choices, sample, strict=True)) for sample in outcome.sample_probabilities.tolist()]
    if asked.explain:
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
        num_samples=0 if asked.method == "linearized" else len(outcome.sample_probabilities),
        method=asked.method,
        recorded=True,
        **decided,
        **optional,
    )


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def warnings_of(served: Served, asked: Asked) -> list[str]:
    """What a client should know of the answers: that the linearisation is not to be trusted with this adapter, and why there
    is neither a prediction set nor an abstention."""
    warnings = []
    if asked.method == "linearized" and served.relative_spread > SPREAD_LIMIT:
        spread = f"its sigma is {served.relative_spread:.2g} of |mu| in the median, above {SPREAD_LIMIT:g}"
        warnings.append(f"the linearized method is biased for the adapter {served.name!r}: {spread}; prefer monte_carlo")
    if asked.uncalibrated is not None:
        warnings.append(asked.uncalibrated)
    return warnings
