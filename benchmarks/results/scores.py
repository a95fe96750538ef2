"""From the logits of a run to the numbers of the page. Nothing is trained or saved here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.results.plan import Run
from benchmarks.results.study import Study
from scalabl.config import SetMethod
from scalabl.evaluation.calibration_fit import TEMPERATURES, minimise, mixture_nll
from scalabl.evaluation.scoring import labelled_scores, outside_scores
from scalabl.model.posterior import DEFAULT_SCHEME, Scheme
from scalabl.uncertainty.conformal import conformal_threshold, prediction_sets, set_scores
from scalabl.uncertainty.predictive import Predictive, predictive

LEVELS = (0.8, 0.9, 0.95)


def score(study: Study, inside: Tensor, outside: Tensor, temperature: float, sets: tuple[str, str]) -> dict[str, float]:
    """Every score of logits [N, K, C] of a labelled set and [N', K, C] of one outside the choices."""
    one, other = (predictive(logits, temperature) for logits in (inside, outside))
    scores = labelled_scores(one, study.sets[sets[0]].answers) | outside_scores(one, other)
    return {name: float(value) for name, value in scores.items()}


def best_temperature(logits: Tensor, answers: Tensor) -> float:
    """The temperature of the lowest NLL: logits [N, K, C]."""
    return minimise(lambda t: mixture_nll(logits, answers, t), TEMPERATURES, 1e-3)[0]


def scores_by_variant(study: Study, run: Run, logits: dict[str, Tensor], notes: dict[str, Any]) -> dict[str, Any]:
    """`plain`, and what the run allows beyond: `tempered`, or `calibrated` with its prediction sets under `conformal`."""
    if run.report == "validation":
        sets = ("validation", "ood_validation")
        return {"plain": score(study, logits["validation"], logits["ood_validation"], 1.0, sets)}
    sets = ("test", "ood")
    scores: dict[str, Any] = {"plain": score(study, logits["test"], logits["ood"], 1.0, sets)}
    if "validation" in logits:  # a single pass: the temperature by the same rows that fit scale and temperature of others
        temperature = best_temperature(
            logits["validation"][study.fit_rows], study.sets["validation"].answers[study.fit_rows]
        )
        scores["tempered"] = score(study, logits["test"], logits["ood"], temperature, sets) | {"temperature": temperature}
    if "thresholds" in logits:
        temperature = notes["temperature"]
        scores["calibrated"] = score(study, logits["test_scaled"], logits["ood_scaled"], temperature, sets)
        scores["conformal"] = _conformal(study, logits, temperature, DEFAULT_SCHEME)
    return scores


def _conformal(study: Study, logits: dict[str, Tensor], temperature: float, scheme: Scheme) -> list[dict[str, Any]]:
    thresholds, test, ood = (
        predictive(logits[name], temperature, scheme) for name in ("thresholds", "test_scaled", "ood_scaled")
    )
    held_out = study.sets["validation"].answers[study.threshold_rows]
    methods: tuple[SetMethod, ...] = ("lac", "aps")
    return [
        {
            "method": method,
            "level": level,
            **_sets(thresholds, held_out, test, study.sets["test"].answers, ood, method, level),
        }
        for method in methods
        for level in LEVELS
    ]


def _sets(
    thresholds: Predictive,
    held_out: Tensor,
    test: Predictive,
    answers: Tensor,
    ood: Predictive,
    method: SetMethod,
    level: float,
) -> dict[str, float]:
    true_scores = set_scores(thresholds.probabilities, method).gather(1, held_out.unsqueeze(1))[:, 0]
    threshold = conformal_threshold(true_scores, level)
    rule = prediction_sets(test.probabilities, method, threshold, keep_top=False)
    served, outside = (prediction_sets(outcome.probabilities, method, threshold) for outcome in (test, ood))
    truth = answers.unsqueeze(1)
    return {
        "coverage_of_rule": float(rule.gather(1, truth).double().mean()),
        "coverage_as_served": float(served.gather(1, truth).double().mean()),
        "size": float(served.sum(-1).double().mean()),
        "size_outside": float(outside.sum(-1).double().mean()),
    }


def ensemble(study: Study, members: list[dict[str, Tensor]]) -> dict[str, Any]:
    """The members' logits [N, 1, C] as samples of one predictive."""
    inside, outside = (torch.cat([logits[name] for logits in members], dim=1) for name in ("test", "ood"))
    return {"plain": score(study, inside, outside, 1.0, ("test", "ood"))}
