"""Drift without labels: a conformal test martingale on the novelty scores of the traffic, valid at any time.

The question is whether the inputs still come from where the calibration rows came from. Each input gets an online p-value:
the rank of its score among the calibration rows *and* all inputs before it, ties broken at random. As long as all of them
are exchangeable these p-values are independent and uniform (Vovk, Gammerman and Shafer, *Algorithmic Learning in a Random
World*, 2nd ed. 2022, chapter 8). p-values against the fixed calibration rows are not: a few hundred rows are a little off,
and ten thousand inputs would show it.

A martingale bets against uniformity. Its value is the capital of a gambler who began with 1. Without a drift it exceeds c at
any time with a probability of at most 1 / c (Ville's inequality), however long the server runs. With a drift it grows
exponentially. When the change lasts, it becomes a part of the inputs before, and the value falls again. So look at its
highest value, for which the inequality holds as well.

Memory is bounded: scores are counted in a fixed histogram over [-1, 1]. Ranks within a bin are random, which keeps the
p-values exactly uniform, since a binned score is a conformity score like any other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

BINS = 8192  # of width 0.00024
EXPONENTS = (0.3, 0.5, 0.7, 0.85)  # of the power bets e p^(e - 1)
PATIENCE = 100.0  # inputs; after n of them a share of PATIENCE / (PATIENCE + n) of the capital still waits
LEAST = 1e-12  # a smaller p-value gains no more than this one
_LOG_EXPONENTS = np.tile(np.log(EXPONENTS), 2)
_EXPONENTS_LESS_1 = np.tile(np.array(EXPONENTS) - 1, 2)


class DriftMartingale:
    """The martingale of one adapter in one process. Not thread-safe.

    The capital is split over bets that each grow best under another kind of change: power bets e p^(e-1) on small p-values
    (inputs stranger than before), and their mirror images on large ones. All of it waits at first. After n inputs a share of
    1 / (PATIENCE + n) of what still waits is put on the bets, evenly. So capital is left for a change that comes late. What
    is bet after n inputs is about PATIENCE / n^2 of the whole, which costs the logarithm of that in growth.

    Args:
        calibration: scores of the calibration rows, in any order.
        seed: of the random ranks within a bin. The same inputs in the same order give the same values.
    """

    def __init__(self, calibration: Iterable[float], seed: int = 0) -> None:
        self._counts: NDArray[np.int64] = np.zeros(BINS, dtype=np.int64)
        for score in calibration:
            self._counts[_bin(score)] += 1
        self._total = int(self._counts.sum())
        self._random = np.random.default_rng(seed)
        self._waiting = 0.0  # natural logarithm of the capital that waits
        self._bets = np.full(2 * len(EXPONENTS), -math.inf)  # likewise, of each bet
        self.inputs = 0  # how many inputs it has seen
        self.highest_log10 = 0.0  # the largest value of `log10` so far

    @property
    def log10(self) -> float:
        """The decimal logarithm of the value: 2 means 100. 0 before the first input."""
        return float(np.logaddexp.reduce([self._waiting, *self._bets])) / math.log(10)

    def see(self, score: float) -> float:
        """Take the score of the next input into account; returns its online p-value, in (0, 1]."""
        p = self._p_value(score)
        share = 1 / (PATIENCE + self.inputs)
        self._bets = np.logaddexp(self._bets, self._waiting + math.log(share / len(self._bets)))
        self._waiting += math.log1p(-share)
        self._bets += _log_bets(p)
        self.inputs += 1
        self.highest_log10 = max(self.highest_log10, self.log10)
        return p

    def _p_value(self, score: float) -> float:
        """(#{scores above} + U (1 + #{scores in the same bin})) / (1 + #{scores}), U uniform; then counts the score too."""
        place = _bin(score)
        above, same = int(self._counts[place + 1 :].sum()), int(self._counts[place])
        self._counts[place] += 1
        self._total += 1  # now with this score
        return float((above + (1 - self._random.random()) * (1 + same)) / self._total)  # 1 - U is never 0


def _bin(score: float) -> int:
    return min(BINS - 1, max(0, int((score + 1) / 2 * BINS)))


def _log_bets(p: float) -> NDArray[np.float64]:
    """The logarithm of each bet's factor for a p-value; under a uniform p-value no factor has a mean above 1."""
    logs = np.repeat([math.log(max(p, LEAST)), math.log(max(1 - p, LEAST))], len(EXPONENTS))
    factors: NDArray[np.float64] = _LOG_EXPONENTS + _EXPONENTS_LESS_1 * logs
    return factors
