"""From what the posterior samples say of an input to the JSON that answers it."""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from scalabl.config import AdapterConfig
from scalabl.uncertainty.predictive import Predictive
from scalabl_server.batching.jobs import Job, Result, is_finite, outcome_of
from scalabl_server.predict.decisions import decisions
from scalabl_server.predict.request import Asked
from scalabl_server.problems import ProblemError
from scalabl_server.schemas import Prediction, StandardError

SMALL = 4096  # logits (samples x choices), which take a few tenths of a millisecond


def is_small(results: Sequence[Result]) -> bool:
    """Whether `answers_of` takes less time than a change of thread and back is worth: one input, of which there are samples
    alone."""
    return len(results) == 1 and isinstance(results[0], Tensor) and results[0].numel() <= SMALL


def answers_of(
    results: Sequence[Result], asked: Asked, config: AdapterConfig, jobs: Sequence[Job]
) -> tuple[list[Predictive], list[Prediction]]:
    """What the pass's result for each input comes to, and its JSON. Belongs off the event loop, unless it `is_small`.

    Raises:
        ProblemError: `internal-error`, for logits that are not finite.
    """
    outcomes = []
    for position, (result, names, job) in enumerate(zip(results, asked.choices, jobs, strict=True)):
        if not is_finite(result):
            raise ProblemError(
                "internal-error", f"the model gave inputs.{position} logits that are not finite; its adapter may be damaged"
            )
        outcomes.append(outcome_of(result, len(names), job, config.temperature))
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
        optional["samples"] = [dict(zip(choices, each, strict=True)) for each in outcome.sample_probabilities.tolist()]
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
