"""The report of an evaluation as plain JSON values: scores with bootstrap intervals, curves, prediction sets and cost.

The scores themselves are in `scoring`, figures in `plots`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from scalabl.config import Calibration
from scalabl.evaluation.scoring import BINS, bins_of, interval, labelled_scores, outside_scores, resamples
from scalabl.uncertainty.conformal import prediction_sets
from scalabl.uncertainty.predictive import Predictive
from scalabl.uncertainty.selective import doubts, risk_coverage

BLOCK = 4_000_000  # bootstrap weights in memory at once
ALPHAS = (0.01, 0.05, 0.1)  # at which the guarantee of novelty p-values is compared with the data
COVERAGES = tuple(step / 20 for step in range(1, 21))


@dataclass(frozen=True)
class NoveltyScores:
    """The novelty of N inputs: scores [N], and p-values [N] with the adapter's level, both None before a calibration."""

    scores: Tensor
    p_values: Tensor | None = None
    level: float | None = None

    @property
    def novel(self) -> Tensor | None:
        """[N] bool: which inputs the adapter calls novel; None if it cannot tell."""
        return None if self.p_values is None or self.level is None else self.p_values <= self.level


@dataclass(frozen=True)
class Evaluated:
    """One data set with its predictions. An answer [N] of -1 is none of the choices; `tokens` counts prompt tokens.

    `novelty` is None if the adapter has no novelty reference.
    """

    name: str
    outcome: Predictive
    answers: Tensor
    num_choices: Tensor
    tokens: int
    seconds: float
    novelty: NoveltyScores | None = None

    def __len__(self) -> int:
        return len(self.answers)


def report(
    inside: Evaluated, outside: list[Evaluated], calibration: Calibration | None, *, repeats: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """The report: `data` is about the labelled set, `ood` about each set of inputs outside the choices.

    Args:
        repeats: number of bootstrap resamples for the 95% intervals; 0 leaves the intervals out.
        seed: random seed of the resamples.
    """
    wrong = inside.outcome.probabilities.argmax(-1) != inside.answers
    data = {
        **_scored(lambda *w: labelled_scores(inside.outcome, inside.answers, *w), (len(inside),), repeats, seed),
        "reliability": reliability(inside.outcome, inside.answers),
        "risk_coverage": {
            name: {f"{share:g}": float(_at(risk_coverage(doubt, wrong), share)) for share in COVERAGES}
            for name, doubt in doubts(inside.outcome).items()
        },
    }
    data |= _decided(inside, calibration)
    return {
        "data": {**_cost(inside), **data},
        "ood": [_outside(inside, evaluated, calibration, repeats, seed) for evaluated in outside],
    }


def _outside(
    inside: Evaluated, outside: Evaluated, calibration: Calibration | None, repeats: int, seed: int
) -> dict[str, Any]:
    scores = [evaluated.novelty.scores for evaluated in (inside, outside) if evaluated.novelty is not None]
    novelty = (scores[0], scores[1]) if len(scores) == 2 else None
    summary = {
        **_cost(outside),
        **_scored(
            lambda *w: outside_scores(inside.outcome, outside.outcome, *w, novelty=novelty),
            (len(inside), len(outside)),
            repeats,
            seed,
        ),
    }
    return summary | _decided(outside, calibration)


def _decided(evaluated: Evaluated, calibration: Calibration | None) -> dict[str, Any]:
    """What a calibrated adapter decides about the inputs: prediction sets, novelty and abstention."""
    decided: dict[str, Any] = {}
    if calibration is not None:
        decided["prediction_sets"] = [_sets(evaluated, calibration, level) for level in calibration.levels]
    novel = None if evaluated.novelty is None else evaluated.novelty.novel
    if evaluated.novelty is not None and evaluated.novelty.p_values is not None and novel is not None:
        decided["novelty"] = {
            "level": evaluated.novelty.level,
            "novel": float(novel.double().mean()),
            "p_value_at_most": {
                f"{alpha:g}": float((evaluated.novelty.p_values <= alpha).double().mean()) for alpha in ALPHAS
            },
        }
    if calibration is not None or novel is not None:
        decided["abstention"] = _abstention(evaluated, calibration, novel)
    return decided


def _cost(evaluated: Evaluated) -> dict[str, Any]:
    return {
        "name": evaluated.name,
        "inputs": len(evaluated),
        "cost": {
            "seconds_per_input": evaluated.seconds / len(evaluated),
            "tokens_per_input": evaluated.tokens / len(evaluated),
        },
    }


def _scored(score: Callable[..., dict[str, Tensor]], counts: tuple[int, ...], repeats: int, seed: int) -> dict[str, Any]:
    """All scores that are not NaN, with an interval for each.

    Args:
        score: computes the scores, given either no arguments or weights [R, N] for each of the data sets.
        counts: N of each data set.
    """
    values = {name: float(value) for name, value in score().items()}
    values = {
        name: value for name, value in values.items() if not math.isnan(value)
    }  # NaN: no wrong answer, or only wrong ones
    if repeats < 1:
        return values
    block_size = max(1, BLOCK // sum(counts))
    sets = [resamples(count, repeats, seed + index, block_size) for index, count in enumerate(counts)]
    scored_blocks = [score(*weights) for weights in zip(*sets, strict=True)]
    return {
        **values,
        "intervals": {
            name: list(interval(value, torch.cat([block[name] for block in scored_blocks])))
            for name, value in values.items()
        },
    }


def _at(curve: Tensor, share: float) -> Tensor:
    return curve[max(0, round(share * len(curve)) - 1)]


def reliability(outcome: Predictive, answers: Tensor) -> list[dict[str, float | int]]:
    """For each non-empty confidence bin: its bounds, number of inputs, mean confidence and accuracy."""
    confidence, index = outcome.probabilities.max(-1)
    hit, bins = (index == answers).double(), bins_of(confidence)
    return [
        {
            "low": number / BINS,
            "high": (number + 1) / BINS,
            "count": int((bins == number).sum()),
            "confidence": float(confidence[bins == number].mean()),
            "accuracy": float(hit[bins == number].mean()),
        }
        for number in range(BINS)
        if bool((bins == number).any())
    ]


def _sets(evaluated: Evaluated, calibration: Calibration, level: str) -> dict[str, Any]:
    """The mean size of the prediction sets, and for labelled inputs how often they contain the answer.

    `coverage` is that of the sets as served, which always contain the top choice. `coverage_of_rule` is that of the
    conformal rule alone, whose sets may be empty; theory is about this number. If the model is right more often than the
    level, sets with the top choice necessarily cover more.
    """
    threshold, p = calibration.levels[level], evaluated.outcome.probabilities
    real = torch.arange(p.shape[1]) < evaluated.num_choices.unsqueeze(1)
    served = prediction_sets(p, calibration.method, threshold) & real
    summary: dict[str, Any] = {
        "level": float(level),
        "method": calibration.method,
        "mean_size": float(served.sum(-1).double().mean()),
    }
    if bool((evaluated.answers >= 0).all()):
        truth = evaluated.answers.unsqueeze(1)
        rule = prediction_sets(p, calibration.method, threshold, keep_top=False)
        summary["coverage"] = float(served.gather(1, truth).double().mean())
        summary["coverage_of_rule"] = float(rule.gather(1, truth).double().mean())
    return summary


def _abstention(evaluated: Evaluated, calibration: Calibration | None, novel: Tensor | None) -> dict[str, Any] | None:
    """The share of inputs that are answered, and for labelled inputs the share of these answers that are wrong.

    An input is answered, as by a server, unless it is uncertain or novel.
    """
    rule = None if calibration is None else calibration.abstain
    if rule is None and novel is None:
        return None
    answered = torch.ones(len(evaluated), dtype=torch.bool)
    summary: dict[str, Any] = {}
    if rule is not None:
        certain = doubts(evaluated.outcome)[rule.score] <= rule.threshold
        answered &= certain
        summary |= {"score": rule.score, "target_risk": rule.target_risk}
    if novel is not None:
        answered &= ~novel
    if rule is not None and novel is not None:
        summary["not_uncertain"] = float(certain.double().mean())
    summary["answered"] = float(answered.double().mean())
    if bool((evaluated.answers >= 0).all()) and bool(answered.any()):
        wrong = evaluated.outcome.probabilities.argmax(-1) != evaluated.answers
        summary["risk"] = float(wrong[answered].double().mean())
    return summary
