"""What an input asks of the engine and how its answer comes from what the passes gave: one class for each method.

Nothing outside of this module asks which method a job has: queue, engines and answers only call its methods.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from scalabl.model.posterior import Draws
from scalabl.uncertainty.adaptive import Rule, settled
from scalabl.uncertainty.linearized import Linearization, controlled
from scalabl.uncertainty.predictive import Predictive, all_finite, predictive
from scalabl_server.batching.row_demand import RowDemand

# The predictive without leading dimensions, and each layer's share of its variance: none where only samples were drawn,
# since they do not tell the layers apart.
Outcome = tuple[Predictive, dict[str, float]]


class Result:
    """What the passes gave for one input.

    Args:
        logits: [K, C] of its samples, where its job draws some.
        linearization: of this input alone (B = 1), where its job is to be linearised.
    """

    def __init__(self, logits: Tensor | None = None, linearization: Linearization | None = None) -> None:
        self._logits, self._linearization = logits, linearization

    @property
    def logits(self) -> Tensor:
        """[K, C].

        Raises:
            LookupError: the job draws no samples.
        """
        if self._logits is None:
            raise LookupError("no samples were run for this input")
        return self._logits

    @property
    def linearization(self) -> Linearization:
        """Of this input.

        Raises:
            LookupError: the job is not linearised.
        """
        if self._linearization is None:
            raise LookupError("this input was not linearised")
        return self._linearization

    @property
    def is_finite(self) -> bool:
        """Whether everything that the passes gave is a number."""
        linear = self._linearization
        parts = [self._logits, None if linear is None else linear.mean, None if linear is None else linear.scaled_jacobian]
        return all(all_finite(part) for part in parts if part is not None)


class Job(ABC):
    """What one input asks of the engine.

    Attributes:
        num_choices: the input's own choices are the first so many of those that the adapter has.
        has_rounds: whether `next_draws` may ever give any.
        is_linearized: whether the input is to be linearised, over its own choices.
    """

    num_choices: int
    has_rounds: ClassVar[bool] = False
    is_linearized: ClassVar[bool] = False

    @property
    @abstractmethod
    def demand(self) -> RowDemand:
        """The rows that it takes; asked when it is queued."""

    def first_draws(self) -> Draws | None:
        """The samples to run first; None where it draws none."""
        return None

    def next_draws(self, logits: Tensor, temperature: float) -> Draws | None:
        """The samples of the next round; None when it has enough. Asked after each round.

        Args:
            logits: [K, C] of all samples so far.
        """
        return None

    def rows_taken(self, result: Result) -> int:
        """The rows that it took of its pass, or its passes."""
        return self.demand.most

    def values_to_read(self, result: Result) -> float:
        """How many numbers `outcome` goes through; infinite where it does more than that."""
        return math.inf

    @abstractmethod
    def outcome(self, result: Result, temperature: float) -> Outcome:
        """The answer over the input's own choices."""


@dataclass(frozen=True, eq=False)
class SampledJob(Job):
    """A fixed number of posterior samples."""

    draws: Draws
    num_choices: int

    @property
    def demand(self) -> RowDemand:
        return RowDemand.fixed(self.draws.num_samples)

    def first_draws(self) -> Draws:
        return self.draws

    def values_to_read(self, result: Result) -> float:
        return result.logits.numel()

    def outcome(self, result: Result, temperature: float) -> Outcome:
        return predictive(result.logits[:, : self.num_choices], temperature, self.draws.scheme), {}


@dataclass(frozen=True, eq=False)
class AdaptiveJob(SampledJob):
    """Posterior samples in rounds, until there are enough. `draws` are the most that it may take; it takes a beginning."""

    rule: Rule

    has_rounds = True

    @staticmethod
    def demand_of(rule: Rule) -> RowDemand:
        """The rows of an input under this rule."""
        return RowDemand(at_once=rule.largest_round, least=rule.first, most=rule.most, learned_as=rule.target)

    @property
    def demand(self) -> RowDemand:
        return self.demand_of(self.rule)

    def first_draws(self) -> Draws:
        return self.draws.part(0, self.rule.rounds()[0])

    def next_draws(self, logits: Tensor, temperature: float) -> Draws | None:
        """None also for logits that are not finite: more samples would not make an answer of them."""
        count = len(logits)
        if count >= self.draws.num_samples or not all_finite(logits):
            return None
        outcome = predictive(logits[:, : self.num_choices].unsqueeze(0), temperature, self.draws.scheme)
        if settled(outcome, self.rule, self.draws.scheme):
            return None
        return self.draws.part(count, self.rule.after(count))

    def rows_taken(self, result: Result) -> int:
        return len(result.logits)


@dataclass(frozen=True, eq=False)
class LinearizedJob(Job):
    """The linearisation around the mean of the posterior. `rows`: of its reverse passes."""

    rows: int
    num_choices: int

    is_linearized = True

    @property
    def demand(self) -> RowDemand:
        return RowDemand.fixed(self.rows)

    def outcome(self, result: Result, temperature: float) -> Outcome:
        linear = result.linearization.of_choices(self.num_choices)
        return linear.predictive(temperature).of_input(0), _layer_shares(linear, temperature)


@dataclass(frozen=True, eq=False)
class ControlVariateJob(Job):
    """Posterior samples, corrected by what the linearisation says of the same samples."""

    draws: Draws
    linear_rows: int
    num_choices: int

    is_linearized = True

    @property
    def demand(self) -> RowDemand:
        return RowDemand.fixed(self.draws.num_samples + self.linear_rows)

    def first_draws(self) -> Draws:
        return self.draws

    def outcome(self, result: Result, temperature: float) -> Outcome:
        linear = result.linearization.of_choices(self.num_choices)
        logits = result.logits[:, : self.num_choices].unsqueeze(0)
        outcome = controlled(logits, linear, self.draws, temperature).of_input(0)
        return outcome, _layer_shares(linear, temperature)


def _layer_shares(linear: Linearization, temperature: float) -> dict[str, float]:
    return {name: float(share[0]) for name, share in linear.layer_shares(temperature).items()}
