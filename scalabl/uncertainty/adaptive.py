"""Adaptive sampling: rounds add posterior samples to an input until a test finds them enough. Runs no model itself.

The draws are nested: a longer sequence begins with the shorter one. So a round adds to the samples of the rounds before, and
an input that stops at K samples has exactly the answer that K samples give. A round runs only the inputs that need more.

Testing in every round makes an error in some round more likely than in one test. So the allowed probability of error is
divided evenly over the rounds (Bonferroni): by the union bound it then holds for whichever round is the last. Critical
values are Student's t and not the normal distribution's, because few samples give a poor estimate of their own spread. The t
test assumes a normal distribution. Where most samples agree and a rare one is far off, the uncertainty is underestimated
until the rare one is drawn; `benchmarks/adaptive.py` measures how often that matters.
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
from scalabl.uncertainty.predictive import Predictive, degrees_of_freedom, predictive, standard_error

Target = Literal["decision", "probabilities", "mutual_information"]
TARGETS: tuple[Target, ...] = get_args(Target)
TOLERANCES: dict[Target, float] = {"decision": 0.005, "probabilities": 0.01, "mutual_information": 0.01}
INTERVAL_ERROR = 0.05  # probabilities and mutual information are held to 95% intervals
AGREEMENT = 1e-6  # samples whose probabilities all lie within this of one another count as equal


@dataclass(frozen=True)
class Rule:
    """When to stop adding samples to an input.

    * `decision`: when the top choice's probability is significantly above that of every other choice, by a paired t test
      over the samples. `tolerance` is the probability, over draws, of stopping at a choice that infinitely many samples
      would not choose; it is divided over the other choices. In addition, no single further sample may be able to change
      the choice, since the spread of the samples says nothing of a rare draw that has not come up yet.
    * `probabilities`: when the standard error of every probability is at most `tolerance`.
    * `mutual_information`: when its standard error plus the bias of the plug-in estimate is at most `tolerance`, in nats.

    For the last two, the 95% interval must be no wider than one from a standard error of exactly `tolerance`. A standard
    error that is estimated from few samples has a wider interval.

    Args:
        tolerance: None for the target's default in `TOLERANCES`.
        first, most: samples after the first and after the last round; each round in between doubles them.

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
            raise ValueError(f"first is {self.first} and most is {self.most}; first must be from 1 to most")

    @property
    def allowed(self) -> float:
        """The tolerance that applies: the given one, or the target's default."""
        return TOLERANCES[self.target] if self.tolerance is None else self.tolerance

    def rounds(self) -> tuple[int, ...]:
        """The number of samples after each round: first, twice that, …, most."""
        counts = []
        count = self.first
        while count < self.most:
            counts.append(count)
            count *= 2
        return (*counts, self.most)

    @property
    def largest_round(self) -> int:
        """The largest number of samples that one round adds to an input."""
        rounds = self.rounds()
        return max(stop - start for start, stop in zip((0, *rounds), rounds, strict=False))

    def after(self, num_samples: int) -> int:
        """The number of samples after the round that follows one with `num_samples`."""
        return next(count for count in self.rounds() if count > num_samples)


def settled(outcome: Predictive, rule: Rule, scheme: Scheme, members: int = 1) -> Tensor:
    """Whether K samples are enough, for each of B inputs: [B] bool. False where K is too small for a standard error.

    Args:
        members: M; sample k is of member k mod M.
    """
    samples = outcome.sample_probabilities  # [B, K, C]
    agree = (samples.amax(1) - samples.amin(1)).amax(-1) <= AGREEMENT
    degrees = degrees_of_freedom(samples.shape[1], scheme, members)
    if degrees < 1:
        return torch.zeros_like(agree)
    looks = len(rule.rounds())
    if rule.target == "decision":
        others = samples.shape[2] - 1
        return agree | _separated(samples, t_quantile(rule.allowed / looks / others, degrees), scheme, members)
    critical = t_quantile(INTERVAL_ERROR / looks / 2, degrees)
    half_width = NormalDist().inv_cdf(1 - INTERVAL_ERROR / 2) * rule.allowed
    if rule.target == "probabilities":
        return agree | (critical * outcome.standard_error.probabilities.amax(-1) <= half_width)
    # The estimate is skewed to the right like a mean of squares, and a small estimate comes with a small standard error.
    # So the interval is taken on the scale of its logarithm. The mean of K samples has 1 / K of the variance of one sample,
    # which is missing from the samples' spread around it: the estimate is too low by that share.
    information = outcome.mutual_information.clamp_min(1e-300)
    above = information * torch.expm1(critical * outcome.standard_error.mutual_information / information)
    missing = information / (samples.shape[1] - 1)
    return agree | (above + missing <= half_width)


def _separated(samples: Tensor, critical: float, scheme: Scheme, members: int) -> Tensor:
    """Whether the top choice's lead over each other is above `critical` standard errors and above 1 / K: [B]."""
    top = samples.mean(1).argmax(-1)  # [B]
    leads = samples.gather(2, top.view(-1, 1, 1).expand(-1, samples.shape[1], 1)) - samples  # [B, K, C]
    lead = leads.mean(1)
    errors = standard_error(leads.transpose(1, 2), scheme, members)
    clear = (lead > critical * errors) & (lead > 1 / samples.shape[1])
    return clear.scatter(1, top.unsqueeze(1), True).all(-1)


@lru_cache(maxsize=256)
def t_quantile(tail: float, degrees: int) -> float:
    """The value that Student's t with these degrees of freedom exceeds with probability `tail` <= 1/2."""
    return -float(stdtrit(degrees, tail))


@dataclass(frozen=True)
class Estimate:
    """The result of one input.

    Attributes:
        outcome: the predictive of all its samples, without the leading dimension.
        num_samples: K.
        settled: whether the rule was met; False if `most` samples were not enough.
    """

    outcome: Predictive
    num_samples: int
    settled: bool


# (indices of the unsettled inputs, start, stop) -> their logits [b, stop - start, C] under draws start to stop - 1
RunRound = Callable[[Sequence[int], int, int], Tensor]


def sample_adaptively(
    run: RunRound,
    count: int,
    rule: Rule,
    *,
    temperature: float = 1.0,
    scheme: Scheme = DEFAULT_SCHEME,
    members: int = 1,
) -> list[Estimate]:
    """Run rounds for `count` inputs until each meets the rule or has `rule.most` samples."""
    unsettled = list(range(count))
    logits: dict[int, list[Tensor]] = {index: [] for index in unsettled}
    estimates: dict[int, Estimate] = {}
    start = 0
    for stop in rule.rounds():
        if not unsettled:
            break
        for index, more in zip(unsettled, run(unsettled, start, stop), strict=True):
            logits[index].append(more)
        stacked = torch.stack([torch.cat(logits[index]) for index in unsettled])
        outcome = predictive(stacked, temperature, scheme, members)
        enough = settled(outcome, rule, scheme, members).tolist()
        for row, index in enumerate(unsettled):
            if enough[row] or stop == rule.most:
                estimates[index] = Estimate(outcome.of_input(row), stop, enough[row])
        unsettled = [index for index in unsettled if index not in estimates]
        start = stop
    return [estimates[index] for index in range(count)]
