"""From what the posterior samples say of an input to the JSON that answers it."""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from scalabl.config import AdapterConfig
from scalabl.posterior import Draws
from scalabl.predictive import Predictive, predictive
from server.decisions import decisions
from server.problems import ProblemError
from server.prompts import Asked
from server.schemas import Prediction, StandardError


def answers_of(
    logits: Sequence[Tensor], asked: Asked, config: AdapterConfig, draws: Draws
) -> tuple[list[Predictive], list[Prediction]]:
    """What the samples' logits [K, C] of each input come to, and its JSON. Runs off the event loop.

    Raises:
        ProblemError: `internal-error`, for logits that are not finite.
    """
    outcomes = []
    for position, (z, names) in enumerate(zip(logits, asked.choices, strict=True)):
        if not bool(z.isfinite().all()):
            raise ProblemError(
                "internal-error", f"the model gave inputs.{position} logits that are not finite; its adapter may be damaged"
            )
        outcomes.append(predictive(z[:, : len(names)], config.temperature, draws.scheme))
    return outcomes, [
        prediction_of(
            outcome, names, draws, asked.return_samples, decisions(outcome, names, config.calibration, asked.level)
        )
        for outcome, names in zip(outcomes, asked.choices, strict=True)
    ]


def prediction_of(
    outcome: Predictive, choices: Sequence[str], draws: Draws, return_samples: bool, decided: dict[str, Any]
) -> Prediction:
    """The answer to one input, with an id of its own."""
    probabilities = outcome.probabilities.tolist()
    index = max(range(len(probabilities)), key=probabilities.__getitem__)
    error = outcome.standard_error
    optional: dict[str, Any] = {}  # left out of the JSON unless asked for
    if return_samples:
        optional["samples"] = [dict(zip(choices, each, strict=True)) for each in outcome.sample_probabilities.tolist()]
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
        num_samples=draws.num_samples,
        method="monte_carlo",
        recorded=True,
        **decided,
        **optional,
    )


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
