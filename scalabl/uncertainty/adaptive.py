"""As many samples as an answer needs: more are added in rounds until what was asked for is known well enough.

The draws are nested (a longer sequence begins with the shorter one), so that a round adds to what the earlier ones gave, and
an input that stops at K samples has exactly the answer that K samples give. Every round runs only the inputs that go on.

Looking again and again makes it likelier to be deceived once. So the probability of error is shared out evenly over the
rounds (Bonferroni), and since few samples know their own spread badly, critical values are Student's t, not the normal's.
By the union bound the promise then holds whichever round is the last. It is t's promise: where most samples agree and a rare
one is far off, the samples before it look surer than they are. What that does is measured by `benchmarks/adaptive.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Literal, get_args

import torch
from scipy.special import stdtrit
from torch import Tensor

from scalabl.model.posterior import DEFAULT_SCHEME, Scheme
from scalabl.uncertainty.predictive import Predictive, independent_units, predictive, standard_error

Target = Literal["decision", "probabilities", "mutual_information"]
TARGETS: tuple[Target, ...] = get_args(Target)
TOLERANCES: dict[Target, float] = {"decision": 0.005, "probabilities": 0.01, "mutual_information": 0.01}
INTERVAL_ERROR = 0.05  # of the intervals that the two kinds of number are held to: 95%
AGREEMENT = 1e-6  # samples whose probabilities all lie this close have nothing left to disagree on


@dataclass(frozen=True)
class Rule:
    """When to stop adding samples to an input.

    * `decision`: when every other choice's probability is below that of the top one, by the samples' own paired
      differences. `tolerance` is the probability, over draws, of stopping at a choice that infinitely many samples would
      not choose, shared out over the other choices too. And one more sample, however contrary, must not be able to change
      the choice: no spread tells of a rare draw that has not been seen.
    * `probabilities`: when the standard error of each is at most `tolerance`.
    * `mutual_information`: when its standard error is, in nats, with what the plug-in estimate is too low by added to it.

    For the last two, the 95% interval must be no wider than it would be with a standard error of `tolerance` known
    beforehand; a standard error that few samples estimate counts for more.

    Args:
        tolerance: None for `TOLERANCES` of the target.
        first, most: samples of the first round, and the most there are; the rounds between double.

    Raises:
        ValueError: an argument out of range.
    """

    target: Target = "decision"
    tolerance: float | None = None
    first: int = 8
    most: int = 64

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise ValueError(f"target is {self.target!r}; use one of {', '.join(TARGETS)}")
        if not 0 < self.allowed < (1 if self.target == "decision" else math.inf):
            raise ValueError(f"tolerance is {self.tolerance}; it must be above 0, and below 1 for a decision")
        if not 1 <= self.first <= self.most:
            raise ValueError(f"the first round has {self.first} samples and there are at most {self.most}")

    @property
    def allowed(self) -> float:
        """The tolerance, or the target's own."""
        return TOLERANCES[self.target] if self.tolerance is None else self.tolerance

    def rounds(self) -> tuple[int, ...]:
        """K after each round: first, twice that, …, most."""
        counts = []
        count = self.first
        while count < self.most:
            counts.append(count)
            count *= 2
        return (*counts, self.most)

    @property
    def largest_round(self) -> int:
        """The most samples that a round adds to an input."""
        rounds = self.rounds()
        return max(stop - start for start, stop in zip((0, *rounds), rounds, strict=False))

    def after(self, num_samples: int) -> int:
        """K of the round that follows the one that ends with so many."""
        return next(count for count in self.rounds() if count > num_samples)


def settled(outcome: Predictive, rule: Rule, scheme: Scheme) -> Tensor:
    """Whether K samples are enough for each of B inputs: [B] bool; never where K is too small for a standard error."""
    samples = outcome.sample_probabilities  # [B, K, C]
    agree = (samples.amax(1) - samples.amin(1)).amax(-1) <= AGREEMENT
    degrees = independent_units(samples.shape[1], scheme) - 1
    if degrees < 1:
        return torch.zeros_like(agree)
    looks = len(rule.rounds())
    if rule.target == "decision":
        others = samples.shape[2] - 1
        return agree | _separated(samples, t_quantile(rule.allowed / looks / others, degrees), scheme)
    critical = t_quantile(INTERVAL_ERROR / looks / 2, degrees)
    half_width = NormalDist().inv_cdf(1 - INTERVAL_ERROR / 2) * rule.allowed
    if rule.target == "probabilities":
        return agree | (critical * outcome.standard_error.probabilities.amax(-1) <= half_width)
    # Like a mean of squares it is skewed to the right, and where it comes out small, so does its error: hence the upper end
    # of an interval on the scale of its logarithm. And since the mean of K samples itself varies by 1 / K of what a sample
    # does, so much is missing from their spread around it.
    information = outcome.mutual_information.clamp_min(1e-300)
    above = information * torch.expm1(critical * outcome.standard_error.mutual_information / information)
    missing = information / (samples.shape[1] - 1)
    return agree | (above + missing <= half_width)


def _separated(samples: Tensor, critical: float, scheme: Scheme) -> Tensor:
    """Whether the top choice's lead over each other is above `critical` standard errors and above 1 / K: [B]."""
    top = samples.mean(1).argmax(-1)  # [B]
    leads = samples.gather(2, top.view(-1, 1, 1).expand(-1, samples.shape[1], 1)) - samples  # [B, K, C]
    lead = leads.mean(1)
    errors = standard_error(leads.transpose(1, 2), scheme)
    clear = (lead > critical * errors) & (lead > 1 / samples.shape[1])
    return clear.scatter(1, top.unsqueeze(1), True).all(-1)


@lru_cache(maxsize=256)
def t_quantile(tail: float, degrees: int) -> float:
    """The t that a Student variable with so many degrees of freedom exceeds with probability `tail` <= 1/2."""
    return -float(stdtrit(degrees, tail))


@dataclass(frozen=True)
class Estimate:
    """What one input came to.

    Attributes:
        outcome: of all samples drawn, without leading dimension; its standard errors are of this many samples.
        num_samples: K.
        settled: whether the rule was met; False where `most` samples were not enough.
    """

    outcome: Predictive
    num_samples: int
    settled: bool


# (inputs that go on, start, stop) -> their logits [b, stop - start, C] under draws start to stop - 1
RunRound = Callable[[Sequence[int], int, int], Tensor]


def sample_adaptively(
    run: RunRound, count: int, rule: Rule, *, temperature: float = 1.0, scheme: Scheme = DEFAULT_SCHEME
) -> list[Estimate]:
    """Run rounds for `count` inputs until each meets the rule or has `rule.most` samples."""
    going = list(range(count))
    logits: dict[int, list[Tensor]] = {index: [] for index in going}
    found: dict[int, Estimate] = {}
    start = 0
    for stop in rule.rounds():
        if not going:
            break
        for index, more in zip(going, run(going, start, stop), strict=True):
            logits[index].append(more)
        outcome = predictive(torch.stack([torch.cat(logits[index]) for index in going]), temperature, scheme)
        enough = settled(outcome, rule, scheme).tolist()
        for row, index in enumerate(going):
            if enough[row] or stop == rule.most:
                found[index] = Estimate(outcome.of_input(row), stop, enough[row])
        going = [index for index in going if index not in found]
        start = stop
    return [found[index] for index in range(count)]
