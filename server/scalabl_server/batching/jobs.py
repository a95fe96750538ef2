"""How a request's predictive is computed: from posterior samples, the linearisation around their mean, or both together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from scalabl.model.posterior import Draws
from scalabl.uncertainty.adaptive import Rule, settled
from scalabl.uncertainty.linearized import SPREAD_LIMIT, Linearization, controlled
from scalabl.uncertainty.predictive import Predictive, all_finite, predictive
from scalabl_server.problems import ProblemError
from scalabl_server.schemas import PredictRequest

if TYPE_CHECKING:
    from scalabl_server.engines.interface import Served
    from scalabl_server.predict.request import Asked


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
class AutoJob:
    """An input that gets samples until it has enough.

    Attributes:
        draws: the most that it may take; it takes a beginning of them.
        num_choices: its own, over which the rule is applied.
    """

    draws: Draws
    rule: Rule
    num_choices: int

    @property
    def num_samples(self) -> int:
        """The rows that it counts as: the most that one of its passes has of it."""
        return self.rule.largest_round

    def has_enough(self, logits: Tensor, temperature: float) -> bool:
        """Whether the rule is met by logits [K, C], or no more can be had; numbers that are none need no more samples."""
        if len(logits) >= self.draws.num_samples or not all_finite(logits):
            return True
        outcome = predictive(logits[:, : self.num_choices].unsqueeze(0), temperature, self.draws.scheme)
        return bool(settled(outcome, self.rule, self.draws.scheme))


@dataclass(frozen=True)
class Controlled:
    """What a `ControlledJob` gives: logits [K, C], and the linearisation of the same input."""

    logits: Tensor
    linear: Linearization


Job = Draws | LinearJob | ControlledJob | AutoJob
Result = Tensor | Linearization | Controlled  # a tensor: [K, C] of an input's samples; a linearisation: of one input, B = 1
# (indices of inputs, the draws of each) -> their logits [K, C] on the CPU, from one pass
RunSamples = Callable[[Sequence[int], Sequence[Draws]], Sequence[Tensor]]


def check_method(request: PredictRequest) -> None:
    """Refuse what a request's method has no use for.

    Raises:
        ProblemError: `invalid-field`.
    """
    if request.num_samples != "auto":
        for field in ("target", "tolerance"):
            if getattr(request, field) is not None:
                raise ProblemError(
                    "invalid-field", f"{field}: it goes with num_samples 'auto'; leave it out, or send that too"
                )
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


def rule_of(request: PredictRequest, max_samples: int) -> Rule | None:
    """When to stop drawing samples, where the request leaves that to the server.

    Raises:
        ProblemError: `invalid-field`.
    """
    if request.num_samples != "auto":
        return None
    if request.method != "monte_carlo":
        raise ProblemError("invalid-field", "num_samples: 'auto' is for the method monte_carlo; send a number")
    target, most = request.target or Rule.target, min(Rule.most, max_samples)
    if target == "decision" and request.tolerance is not None and request.tolerance >= 1:
        raise ProblemError("invalid-field", "tolerance: for the target decision it is a probability; send one below 1")
    return Rule(target, request.tolerance, min(Rule.first, most), most)


def jobs_for(served: Served, asked: Asked) -> list[Job]:
    """What each input of a request needs."""
    if asked.rule is not None:
        draws = served.draws(asked.num_samples, asked.seed)
        return [AutoJob(draws, asked.rule, len(names)) for names in asked.choices]
    if asked.method == "monte_carlo":
        return [served.draws(asked.num_samples, asked.seed)] * len(asked.texts)
    linear = [LinearJob(asked.rows - asked.num_samples, len(names)) for names in asked.choices]
    if asked.method == "linearized":
        return list(linear)
    draws = served.draws(asked.num_samples, asked.seed)
    return [ControlledJob(draws, job) for job in linear]


def rows_of(job: Job, result: Result) -> int:
    """The rows that an input took in its pass, or its passes."""
    return len(result) if isinstance(job, AutoJob) and isinstance(result, Tensor) else job.num_samples


def is_finite(result: Result) -> bool:
    """Whether everything that a pass gave is a number."""
    if isinstance(result, Controlled):
        return is_finite(result.logits) and is_finite(result.linear)
    parts = [result] if isinstance(result, Tensor) else [result.mean, result.scaled_jacobian]
    return all(map(all_finite, parts))


def sample_jobs(run: RunSamples, jobs: Sequence[Job], temperature: float) -> dict[int, Tensor]:
    """Logits [K, C] of every job that draws samples, by its index: one pass for all of them, and one for each round of those
    that go on."""
    firsts: dict[tuple[int, int], Draws] = {}  # the same object for the same draws
    sampled = {index: _first_draws(job, firsts) for index, job in enumerate(jobs) if not isinstance(job, LinearJob)}
    if not sampled:
        return {}
    logits_of = dict(zip(sampled, run(list(sampled), list(sampled.values())), strict=True))
    going = {index: job for index, job in enumerate(jobs) if isinstance(job, AutoJob)}
    while True:
        going = {index: job for index, job in going.items() if not job.has_enough(logits_of[index], temperature)}
        if not going:
            return logits_of
        made: dict[tuple[int, int, int], Draws] = {}
        parts = []
        for index, job in going.items():
            start = len(logits_of[index])
            stop = job.rule.after(start)
            parts.append(made.setdefault((id(job.draws), start, stop), job.draws.part(start, stop)))
        for index, more in zip(going, run(list(going), parts), strict=True):
            logits_of[index] = torch.cat([logits_of[index], more])


def _first_draws(job: Draws | ControlledJob | AutoJob, made: dict[tuple[int, int], Draws]) -> Draws:
    if isinstance(job, AutoJob):
        first = job.rule.rounds()[0]
        return made.setdefault((id(job.draws), first), job.draws.part(0, first))
    return job if isinstance(job, Draws) else job.draws


def linear_jobs(jobs: Sequence[Job]) -> dict[int, LinearJob]:
    """What is to be linearised, by its index among the jobs."""
    return {
        index: job if isinstance(job, LinearJob) else job.linear
        for index, job in enumerate(jobs)
        if isinstance(job, LinearJob | ControlledJob)
    }


def joined(logits_of: dict[int, Tensor], linear_of: dict[int, Linearization], count: int) -> list[Result]:
    """Each job's result, from its logits, its linearisation or both."""
    return [_result(logits_of.get(index), linear_of.get(index)) for index in range(count)]


def _result(logits: Tensor | None, linear: Linearization | None) -> Result:
    if linear is None:
        assert logits is not None
        return logits
    return linear if logits is None else Controlled(logits, linear)


def outcome_of(result: Result, num_choices: int, job: Job, temperature: float) -> tuple[Predictive, dict[str, float]]:
    """The predictive over an input's first `num_choices`, without leading dimensions, and each layer's share of the doubt.

    The shares are empty for samples, which do not tell the layers apart.
    """
    if isinstance(job, Draws | AutoJob):
        assert isinstance(result, Tensor)
        scheme = job.scheme if isinstance(job, Draws) else job.draws.scheme
        return predictive(result[:, :num_choices], temperature, scheme), {}
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
