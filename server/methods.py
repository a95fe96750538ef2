"""How a request's predictive is computed: from posterior samples, the linearisation around their mean, or both together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scalabl.linearized import NEGLIGIBLE, SPREAD_LIMIT, Linearization, controlled, linearize
from scalabl.model import ScalaBLModel, TokenBatch
from scalabl.posterior import Draws
from scalabl.predictive import Predictive, predictive
from server.problems import ProblemError
from server.schemas import PredictRequest

if TYPE_CHECKING:
    from server.engine import Served
    from server.prompts import Asked


@dataclass(frozen=True)
class LinearJob:
    """An input that is to be linearised over its own first `num_choices`. `num_samples`: the rows that it counts as."""

    num_samples: int
    num_choices: int


@dataclass(frozen=True)
class ControlledJob:
    """An input that is to be sampled and linearised. `num_samples`: the rows that it counts as, those of both."""

    draws: Draws
    linear: LinearJob

    @property
    def num_samples(self) -> int:
        return self.draws.num_samples + self.linear.num_samples


@dataclass(frozen=True)
class Controlled:
    """What a `ControlledJob` gives: logits [K, C], and the linearisation of the same input."""

    logits: Tensor
    linear: Linearization


Job = Draws | LinearJob | ControlledJob
Result = Tensor | Linearization | Controlled  # a tensor: [K, C] of an input's samples; a linearisation: of one input, B = 1


def check_method(request: PredictRequest) -> None:
    """Refuse what a request's method has no use for.

    Raises:
        ProblemError: `invalid-field`.
    """
    if request.method == "linearized":
        for field in ("num_samples", "seed", "return_samples"):
            value = getattr(request, field)
            if value is not None and value is not False:
                raise ProblemError("invalid-field", f"{field}: the linearized method draws no samples; leave the field out")
    elif request.explain and request.method == "monte_carlo":
        raise ProblemError(
            "invalid-field",
            "explain: samples alone do not tell layers apart; send the method 'linearized' or 'control_variate'",
        )


def jobs_for(served: Served, asked: Asked) -> list[Job]:
    """What each input of a request needs."""
    if asked.method == "monte_carlo":
        return [served.draws(asked.num_samples, asked.seed)] * len(asked.texts)
    linear = [LinearJob(asked.rows - asked.num_samples, len(names)) for names in asked.choices]
    if asked.method == "linearized":
        return list(linear)
    draws = served.draws(asked.num_samples, asked.seed)
    return [ControlledJob(draws, job) for job in linear]


def is_finite(result: Result) -> bool:
    """Whether everything that a pass gave is a number."""
    if isinstance(result, Controlled):
        return is_finite(result.logits) and is_finite(result.linear)
    parts = [result] if isinstance(result, Tensor) else [result.mean, result.scaled_jacobian]
    return all(bool(part.isfinite().all()) for part in parts)


def run_jobs(model: ScalaBLModel, sequences: Sequence[Sequence[int]], jobs: Sequence[Job]) -> list[Result]:
    """B prompts, each with its job; one forward pass for all that are sampled."""
    logits_of: dict[int, Tensor] = {}
    sampled = [
        (index, job if isinstance(job, Draws) else job.draws)
        for index, job in enumerate(jobs)
        if not isinstance(job, LinearJob)
    ]
    if sampled:
        batch = TokenBatch.of([sequences[index] for index, _ in sampled])
        for (index, _), logits in zip(sampled, model.logits_each(batch, [draws for _, draws in sampled]), strict=True):
            logits_of[index] = logits.cpu()
    linear_of: dict[int, Linearization] = {}
    linear = [
        (index, job if isinstance(job, LinearJob) else job.linear)
        for index, job in enumerate(jobs)
        if not isinstance(job, Draws)
    ]
    if linear:
        batch = TokenBatch.of([sequences[index] for index, _ in linear])
        counts = torch.tensor([job.num_choices for _, job in linear])
        found = linearize(model, batch, num_choices=counts, negligible=NEGLIGIBLE)
        linear_of = {index: found.of_input(row) for row, (index, _) in enumerate(linear)}
    return [_result(logits_of.get(index), linear_of.get(index)) for index in range(len(jobs))]


def _result(logits: Tensor | None, linear: Linearization | None) -> Result:
    if linear is None:
        assert logits is not None
        return logits
    return linear if logits is None else Controlled(logits, linear)


def outcome_of(result: Result, num_choices: int, job: Job, temperature: float) -> tuple[Predictive, dict[str, float]]:
    """The predictive over an input's first `num_choices`, without leading dimensions, and each layer's share of the doubt.

    The shares are empty for samples, which do not tell the layers apart.
    """
    if isinstance(job, Draws):
        assert isinstance(result, Tensor)
        return predictive(result[:, :num_choices], temperature, job.scheme), {}
    assert not isinstance(result, Tensor)
    linear = (result.linear if isinstance(result, Controlled) else result).of_choices(num_choices)
    shares = {name: float(share[0]) for name, share in linear.layer_shares(temperature).items()}
    if isinstance(job, LinearJob):
        return linear.predictive(temperature).of_input(0), shares
    assert isinstance(result, Controlled)
    logits = result.logits[:, :num_choices].unsqueeze(0)
    return controlled(logits, linear, job.draws, temperature).of_input(0), shares


def warnings_of(served: Served, asked: Asked) -> list[str]:
    """What a client should know of the answer: that the linearisation is not to be trusted with this adapter."""
    if asked.method != "linearized" or served.relative_spread <= SPREAD_LIMIT:
        return []
    spread = f"its sigma is {served.relative_spread:.2g} of |mu| in the median, above {SPREAD_LIMIT:g}"
    return [f"the linearized method is biased for the adapter {served.name!r}: {spread}; prefer monte_carlo"]
