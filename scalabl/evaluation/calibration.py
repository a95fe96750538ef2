"""Calibration on held-out labels: posterior scale and temperature by NLL, then thresholds for sets and abstention.

The rows are split into two halves. The first is used to choose scale, temperature and doubt score. The second gives the
thresholds and the reported numbers; since nothing was fitted to it, the guarantees hold for new inputs of the same kind.
It has one other use: scale and temperature go back to 1 if it does not agree with them. In simulations this choice changed
neither the coverage of the sets nor the guarantee of the risk. The fit itself is in `calibration_fit`,
prediction sets and abstention themselves in `uncertainty`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from scalabl.config import Abstention, Calibration, CalibrationData, DoubtName, Fit, SetMethod
from scalabl.errors import CalibrationError
from scalabl.evaluation.calibration_fit import Trial, checked_fit
from scalabl.evaluation.encoded import EncodedSet
from scalabl.evaluation.inference import logits_of
from scalabl.evaluation.scoring import scores
from scalabl.model.posterior import Draws
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.uncertainty.absent_choices import without_absent
from scalabl.uncertainty.conformal import conformal_threshold, set_scores
from scalabl.uncertainty.predictive import Predictive, predictive
from scalabl.uncertainty.selective import aurc, check_rows_for_risk, doubts, guaranteed_threshold

MIN_ROWS = 20  # half of them are ten: fewer can neither fit anything nor show that a fit is harmful
NEGLIGIBLE = 1e-9  # a threshold this near to 0 or 1 is at the end of its range
REFERENCE_QUANTILES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


def split_halves(answers: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Row indices of two random halves, with each answer split evenly between them."""
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(answers)))
    order = order[answers[order].argsort(stable=True)]
    return order[::2].sort().values, order[1::2].sort().values


@dataclass(frozen=True)
class Options:
    """The settings of a calibration. If `target_risk` is None, no abstention threshold is computed."""

    levels: tuple[float, ...] = (0.8, 0.9, 0.95)
    method: SetMethod = "lac"
    target_risk: float | None = 0.05
    confidence: float = 0.9
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """The result of a calibration: the new values for the adapter's config, and every trial of the fit.

    Attributes:
        notes: what a user should know of it, one sentence each; the first says how scale and temperature were chosen.
        refusal: why there is no abstention threshold although one was requested.
    """

    posterior_scale: float
    temperature: float
    calibration: Calibration
    trials: list[Trial]
    notes: list[str]
    refusal: str | None = None


def calibrate(
    model: ScalaBLModel,
    encoded: EncodedSet,
    draws: Draws,
    options: Options,
    *,
    name: str,
    sha256: str,
    on_progress: Callable[[int], object] | None = None,
) -> Outcome:
    """Fit scale and temperature on one half of labelled rows, and compute the thresholds on the other.

    Args:
        model: its posterior scale and temperature must be 1; calibration starts from the posterior as trained.
        name, sha256: name and hash of the data file, to be recorded.
        on_progress: called after each batch with its number of inputs; the number of batches is not known beforehand.

    Raises:
        CalibrationError: too few rows for a level or for the target risk; checked before any pass.
    """
    assert model.config.posterior_scale == model.config.temperature == 1
    chosen, held_out = split_halves(encoded.answers, options.seed)
    if len(encoded.answers) < MIN_ROWS:
        raise CalibrationError(
            f"calibration needs at least {MIN_ROWS} rows, and there are {len(encoded.answers)}; give more"
        )
    for level in options.levels:  # fail before the long passes, if there are too few rows
        conformal_threshold(torch.zeros(len(held_out)), level)

    if options.target_risk is not None:
        check_rows_for_risk(len(held_out), options.target_risk, options.confidence)

    def logits_at(rows: Tensor, scale: float) -> Tensor:
        scaled = draws.scaled(scale)
        sequences = [encoded.sequences[i] for i in rows.tolist()]
        logits = logits_of(model, sequences, scaled, on_progress=on_progress)
        return without_absent(logits, encoded.num_choices[rows])

    answers = encoded.answers[held_out]
    fit = checked_fit(
        lambda scale: logits_at(chosen, scale),
        encoded.answers[chosen],
        lambda scale: logits_at(held_out, scale),
        answers,
    )
    scale, temperature = fit.posterior_scale, fit.temperature
    fit_outcome = predictive(fit.fit_logits, temperature, draws.scheme, draws.members)
    outcome = predictive(fit.after, temperature, draws.scheme, draws.members)
    thresholds: dict[SetMethod, dict[str, float]] = {
        method: {
            f"{level:g}": conformal_threshold(_of_answers(set_scores(outcome.probabilities, method), answers), level)
            for level in sorted(options.levels)
        }
        for method in get_args(SetMethod)
    }
    notes = [fit.summary, *_degenerate_thresholds(thresholds, options.method)]
    abstain, refusal = None, None
    try:
        abstain = _abstention(fit_outcome, encoded.answers[chosen], outcome, answers, options, few_errors=fit.few_errors)
    except CalibrationError as error:  # the rest of the calibration is still useful
        refusal = str(error)
    if abstain is not None:
        notes += _notes_on(abstain, few_errors=fit.few_errors)
    calibration = Calibration(
        data=CalibrationData(
            name=name, sha256=sha256, rows=len(encoded.answers), fit_rows=len(chosen), threshold_rows=len(held_out)
        ),
        num_samples=draws.num_samples,
        seed=draws.seed,
        draw_scheme=draws.scheme,
        method=options.method,
        thresholds=thresholds,
        abstain=abstain,
        quantiles={"mutual_information": _quantiles(outcome.mutual_information), "entropy": _quantiles(outcome.entropy)},
        before=_fit_of(predictive(fit.before, 1.0, draws.scheme, draws.members), answers),
        after=_fit_of(outcome, answers),
    )
    return Outcome(scale, temperature, calibration, fit.trials, notes, refusal)


def _of_answers(scores: Tensor, answers: Tensor) -> Tensor:
    return scores.gather(1, answers.unsqueeze(1))[:, 0]


def _quantiles(values: Tensor) -> dict[str, float]:
    quantiles = torch.quantile(values, torch.tensor(REFERENCE_QUANTILES, dtype=values.dtype)).tolist()
    return dict(zip(map("{:g}".format, REFERENCE_QUANTILES), quantiles, strict=True))


def _fit_of(outcome: Predictive, answers: Tensor) -> Fit:
    values = scores(outcome, answers)
    return Fit(nll=values["nll"], ece=values["ece"])


def _abstention(
    fitted: Predictive, fit_answers: Tensor, outcome: Predictive, answers: Tensor, options: Options, *, few_errors: bool
) -> Abstention | None:
    """The abstention rule, with the doubt score that separates the errors of the fit rows best.

    With few errors the scores cannot be told apart, and entropy is taken, which needs no such choice. The guarantee holds
    for any score: it is chosen without the rows that the threshold is tested on.
    """
    if options.target_risk is None:
        return None
    mistakes = fitted.probabilities.argmax(-1) != fit_answers
    candidates = doubts(fitted)
    score: DoubtName = "entropy" if few_errors else min(candidates, key=lambda name: aurc(candidates[name], mistakes))
    guaranteed = guaranteed_threshold(
        candidates[score],
        doubts(outcome)[score],
        outcome.probabilities.argmax(-1) != answers,
        options.target_risk,
        options.confidence,
    )
    return Abstention(
        score=score,
        threshold=guaranteed.threshold,
        target_risk=options.target_risk,
        confidence=options.confidence,
        achieved_risk=guaranteed.risk,
        risk_bound=guaranteed.bound,
        coverage=guaranteed.coverage,
    )


def _degenerate_thresholds(thresholds: dict[SetMethod, dict[str, float]], method: SetMethod) -> list[str]:
    """A note for each threshold of the served method at which sets no longer depend on the input."""
    notes = []
    for level, threshold in thresholds[method].items():
        if threshold <= NEGLIGIBLE:
            notes.append(
                f"at level {level} prediction sets hold only the most probable choice: the rows for the thresholds are "
                "answered right with certainty. Their coverage holds only for inputs as easy as these rows"
            )
        elif threshold >= 1 - NEGLIGIBLE:
            notes.append(
                f"at level {level} prediction sets hold every choice: some answers of the rows for the thresholds have a "
                "probability of almost 0. Check their labels, or lower --levels"
            )
    return notes


def _notes_on(abstain: Abstention, *, few_errors: bool) -> list[str]:
    """What a user should know of an abstention threshold: how its score was chosen, and whether it is extreme."""
    notes = []
    if few_errors:
        notes.append("abstention uses entropy: too few rows to fit are answered wrong to compare the doubt scores")
    if abstain.threshold <= NEGLIGIBLE:
        notes.append("the abstention threshold is 0: only answers without any doubt are given")
    return notes
