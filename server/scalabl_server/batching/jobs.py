"""Jobs: what an input needs from the engine, and how its answer is computed from the result. One class per method.

Only this module knows which method a job has. The queue, the engines and the answers only call the job's methods.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from scalabl.model.posterior import Draws
from scalabl.uncertainty.absent_choices import OwnChoices, columns_of
from scalabl.uncertainty.adaptive import Rule, settled
from scalabl.uncertainty.linearized import Linearization, controlled
from scalabl.uncertainty.predictive import Predictive, all_finite, predictive
from scalabl_server.batching.row_demand import RowDemand

# The predictive distribution of one input, without a batch dimension, and each layer's share of its variance. The shares
# are empty for the method monte_carlo, because samples alone do not separate the layers.
Outcome = tuple[Predictive, dict[str, float]]


class Result:
    """The result of the passes for one input.

    Args:
        logits: [K, C], if the job draws samples.
        linearization: of this input alone (B = 1), if the job is linearised.
    """

    def __init__(self, logits: Tensor | None = None, linearization: Linearization | None = None) -> None:
        self._logits, self._linearization = logits, linearization

    @property
    def logits(self) -> Tensor:
        """The logits of the samples, [K, C].

        Raises:
            LookupError: the job draws no samples.
        """
        if self._logits is None:
            raise LookupError("no samples were run for this input")
        return self._logits

    @property
    def linearization(self) -> Linearization:
        """The linearisation of this input.

        Raises:
            LookupError: the job is not linearised.
        """
        if self._linearization is None:
            raise LookupError("this input was not linearised")
        return self._linearization

    @property
    def is_finite(self) -> bool:
        """Whether all numbers of the result are finite."""
        linear = self._linearization
        parts = [self._logits, None if linear is None else linear.mean, None if linear is None else linear.scaled_jacobian]
        return all(all_finite(part) for part in parts if part is not None)


class Job(ABC):
    """What one input needs from the engine.

    Attributes:
        choices: the input's own choices: the first ones among the adapter's, or those that its request names.
        has_rounds: whether `next_draws` may return further samples.
        is_linearized: whether the engine must linearise the input, over its own choices.
    """

    choices: OwnChoices
    has_rounds: ClassVar[bool] = False
    is_linearized: ClassVar[bool] = False

    @property
    @abstractmethod
    def demand(self) -> RowDemand:
        """The batch rows that the input may take. Used when it is queued."""

    def first_draws(self) -> Draws | None:
        """The samples of the first round; None if the method draws no samples."""
        return None

    def next_draws(self, logits: Tensor, temperature: float) -> Draws | None:
        """The samples of the next round; None when there are enough. Called after each round.

        Args:
            logits: [K, C] of all samples so far.
        """
        return None

    def rows_taken(self, result: Result) -> int:
        """The batch rows that the input took, in all of its passes."""
        return self.demand.most

    def values_to_read(self, result: Result) -> float:
        """The amount of numbers that `outcome` processes; infinite if its work is not proportional to that."""
        return math.inf

    @abstractmethod
    def outcome(self, result: Result, temperature: float) -> Outcome:
        """Compute the answer over the input's own choices."""


@dataclass(frozen=True, eq=False)
class SampledJob(Job):
    """A fixed number of posterior samples."""

    draws: Draws
    choices: OwnChoices

    @property
    def demand(self) -> RowDemand:
        return RowDemand.fixed(self.draws.num_samples)

    def first_draws(self) -> Draws:
        return self.draws

    def values_to_read(self, result: Result) -> float:
        return result.logits.numel()

    def outcome(self, result: Result, temperature: float) -> Outcome:
        logits = result.logits[:, columns_of(self.choices)]
        return predictive(logits, temperature, self.draws.scheme, self.draws.members), {}


@dataclass(frozen=True, eq=False)
class AdaptiveJob(SampledJob):
    """Posterior samples in rounds, until there are enough. `draws` holds the maximum; the job uses the first of them."""

    rule: Rule

    has_rounds = True

    @staticmethod
    def demand_of(rule: Rule) -> RowDemand:
        """The batch rows of an input under this rule."""
        return RowDemand(at_once=rule.largest_round, least=rule.first, most=rule.most, learned_as=rule.target)

    @property
    def demand(self) -> RowDemand:
        return self.demand_of(self.rule)

    def first_draws(self) -> Draws:
        return self.draws.part(0, self.rule.rounds()[0])

    def next_draws(self, logits: Tensor, temperature: float) -> Draws | None:
        """As in `Job`. Also None if the logits are not finite, because more samples would not help."""
        count = len(logits)
        if count >= self.draws.num_samples or not all_finite(logits):
            return None
        scheme, members = self.draws.scheme, self.draws.members
        outcome = predictive(logits[:, columns_of(self.choices)].unsqueeze(0), temperature, scheme, members)
        if settled(outcome, self.rule, scheme, members):
            return None
        return self.draws.part(count, self.rule.after(count))

    def rows_taken(self, result: Result) -> int:
        return len(result.logits)


@dataclass(frozen=True, eq=False)
class LinearizedJob(Job):
    """The linearisation around the posterior mean. `rows`: batch rows of its backward passes, one per choice."""

    rows: int
    choices: OwnChoices

    is_linearized = True

    @property
    def demand(self) -> RowDemand:
        return RowDemand.fixed(self.rows)

    def outcome(self, result: Result, temperature: float) -> Outcome:
        linear = result.linearization.of_choices(self.choices)
        return linear.predictive(temperature).of_input(0), _layer_shares(linear, temperature)


@dataclass(frozen=True, eq=False)
class ControlVariateJob(Job):
    """Posterior samples, with the linearisation at the same samples as control variate."""

    draws: Draws
    linear_rows: int
    choices: OwnChoices

    is_linearized = True

    @property
    def demand(self) -> RowDemand:
        return RowDemand.fixed(self.draws.num_samples + self.linear_rows)

    def first_draws(self) -> Draws:
        return self.draws

    def outcome(self, result: Result, temperature: float) -> Outcome:
        linear = result.linearization.of_choices(self.choices)
        logits = result.logits[:, columns_of(self.choices)].unsqueeze(0)
        outcome = controlled(logits, linear, self.draws, temperature).of_input(0)
        return outcome, _layer_shares(linear, temperature)


def _layer_shares(linear: Linearization, temperature: float) -> dict[str, float]:
    return {name: float(share[0]) for name, share in linear.layer_shares(temperature).items()}
