"""Calibration on held-out labels: posterior scale and temperature by NLL, then thresholds for sets and abstention.

The rows are split into two halves. The first is used to choose scale, temperature and doubt score. The second gives the
thresholds and the reported numbers; since nothing was fitted to it, the guarantees hold for new inputs of the same kind.
Prediction sets and abstention themselves are in `uncertainty`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

from scalabl.config import Abstention, Calibration, CalibrationData, Fit, SetMethod
from scalabl.errors import CalibrationError
from scalabl.evaluation.encoded import EncodedSet
from scalabl.evaluation.inference import logits_of
from scalabl.evaluation.scoring import scores
from scalabl.model.posterior import Draws
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.uncertainty.absent_choices import without_absent
from scalabl.uncertainty.conformal import conformal_threshold, set_scores
from scalabl.uncertainty.predictive import Predictive, predictive
from scalabl.uncertainty.selective import aurc, check_rows_for_risk, doubts, guaranteed_threshold

SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
TEMPERATURES = tuple(float(t) for t in np.geomspace(0.1, 10.0, 13))
REFERENCE_QUANTILES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)

LogitsAt = Callable[[float], Tensor]  # posterior scale tau -> logits [N, K, C]


def mixture_nll(logits: Tensor, answers: Tensor, temperature: float) -> float:
    """-mean_n ln mean_k softmax(z_nk / T)[y_n], in nats: logits [N, K, C], answers [N]."""
    return _tempered_nll(_gaps(logits, answers), temperature)


def _gaps(logits: Tensor, answers: Tensor) -> Tensor:
    """Each choice's logit minus the answer's, z - z_y: [N, K, C] float64."""
    picked = answers.view(-1, 1, 1).expand(-1, logits.shape[1], 1)
    return logits.double() - logits.double().gather(-1, picked)


def _tempered_nll(gaps: Tensor, temperature: float) -> float:
    return float(_row_nll(gaps, temperature).mean())


def _row_nll(gaps: Tensor, temperature: float) -> Tensor:
    log_p = -torch.logsumexp(gaps / temperature, dim=-1)  # [N, K], log-probability of the answer
    return math.log(gaps.shape[1]) - torch.logsumexp(log_p, dim=-1)


def minimise(loss: Callable[[float], float], grid: Sequence[float], tolerance: float) -> tuple[float, float]:
    """Minimise a function of x > 0: the lowest point of a grid, refined by Brent's bounded search between its neighbours.

    Args:
        grid: values of x, ascending.
        tolerance: of ln x.

    Returns:
        (x, loss) of the minimum.
    """
    values = [loss(x) for x in grid]
    best = min(range(len(grid)), key=values.__getitem__)
    bounds = math.log(grid[max(0, best - 1)]), math.log(grid[min(len(grid) - 1, best + 1)])
    refined = minimize_scalar(
        lambda log_x: loss(math.exp(log_x)), bounds=bounds, method="bounded", options={"xatol": tolerance}
    )
    # If the loss has several minima or is lowest at an end, the grid point may be lower than the refined one.
    return min((grid[best], values[best]), (math.exp(refined.x), float(refined.fun)), key=lambda point: point[1])


@dataclass(frozen=True)
class Trial:
    """One posterior scale with its best temperature, and the NLL at that temperature and at T = 1."""

    posterior_scale: float
    temperature: float
    nll: float
    nll_untempered: float


@dataclass(frozen=True)
class ScaleFit:
    """The chosen trial with its logits [N, K, C], and all trials in ascending order of scale."""

    best: Trial
    logits: Tensor
    trials: list[Trial]


def fit_scale(logits_at: LogitsAt, answers: Tensor, tolerance: float = 0.2) -> ScaleFit:
    """The posterior scale and temperature with the lowest NLL, or scale 1 if the difference is within the noise.

    Each scale costs one pass over the data; its temperature is fitted to the logits of that pass. Scale 1 and temperature 1
    are always tried, so the fit is never worse than none. NLL often hardly depends on the scale, because the temperature
    makes up for it, while mutual information does. So scale 1, the posterior as trained, stays unless another scale is
    better by more than the standard error of the difference over the rows (one-standard-error rule, Breiman et al. 1984).

    Args:
        logits_at: computes logits [N, K, C] for a posterior scale, always with the same draws.
        answers: [N].
        tolerance: of ln tau; NLL is so flat around its minimum that data cannot distinguish closer scales.
    """
    trials: list[Trial] = []
    logits_and_nll: dict[str, tuple[Tensor, Tensor]] = {}  # logits and each row's NLL, of the best scale and of scale 1

    def best_nll(scale: float) -> float:
        logits = logits_at(scale)
        gaps = _gaps(logits, answers)
        untempered = _tempered_nll(gaps, 1.0)
        temperature, nll = minimise(lambda t: _tempered_nll(gaps, t), TEMPERATURES, 1e-3)
        if nll >= untempered:
            temperature, nll = 1.0, untempered
        result = logits, _row_nll(gaps, temperature)
        if all(nll < trial.nll for trial in trials):
            logits_and_nll["best"] = result
        if scale == 1:
            logits_and_nll["unscaled"] = result
        trials.append(Trial(scale, temperature, nll, untempered))
        return nll

    minimise(best_nll, SCALES, tolerance)
    chosen, choice = min(trials, key=lambda trial: trial.nll), "best"
    gain = logits_and_nll["unscaled"][1] - logits_and_nll["best"][1]
    if float(gain.mean()) <= float(gain.std()) / math.sqrt(len(gain)):
        chosen, choice = next(trial for trial in trials if trial.posterior_scale == 1), "unscaled"
    return ScaleFit(chosen, logits_and_nll[choice][0], sorted(trials, key=lambda trial: trial.posterior_scale))


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

    `refusal` says why there is no abstention threshold although one was requested.
    """

    posterior_scale: float
    temperature: float
    calibration: Calibration
    trials: list[Trial]
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
    if len(held_out) < 1:
        raise CalibrationError(f"calibration needs at least two rows, and there are {len(encoded.answers)}; give more rows")
    for level in options.levels:  # fail before the long passes, if there are too few rows
        conformal_threshold(torch.zeros(len(held_out)), level)

    if options.target_risk is not None:
        check_rows_for_risk(len(held_out), options.target_risk, options.confidence)

    def logits_at(rows: Tensor, scale: float) -> Tensor:
        scaled = draws.scaled(scale)
        sequences = [encoded.sequences[i] for i in rows.tolist()]
        logits = logits_of(model, sequences, scaled, on_progress=on_progress)
        return without_absent(logits, encoded.num_choices[rows])

    fit = fit_scale(lambda scale: logits_at(chosen, scale), encoded.answers[chosen])
    scale, temperature = fit.best.posterior_scale, fit.best.temperature
    fit_outcome = predictive(fit.logits, temperature, draws.scheme)
    answers = encoded.answers[held_out]
    before = logits_at(held_out, 1.0)
    after = before if scale == 1 else logits_at(held_out, scale)
    outcome = predictive(after, temperature, draws.scheme)
    thresholds: dict[SetMethod, dict[str, float]] = {
        method: {
            f"{level:g}": conformal_threshold(_of_answers(set_scores(outcome.probabilities, method), answers), level)
            for level in sorted(options.levels)
        }
        for method in get_args(SetMethod)
    }
    abstain, refusal = None, None
    try:
        abstain = _abstention(fit_outcome, encoded.answers[chosen], outcome, answers, options)
    except CalibrationError as error:  # the rest of the calibration is still useful
        refusal = str(error)
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
        before=_fit_of(predictive(before, 1.0, draws.scheme), answers),
        after=_fit_of(outcome, answers),
    )
    return Outcome(scale, temperature, calibration, fit.trials, refusal)


def _of_answers(scores: Tensor, answers: Tensor) -> Tensor:
    return scores.gather(1, answers.unsqueeze(1))[:, 0]


def _quantiles(values: Tensor) -> dict[str, float]:
    quantiles = torch.quantile(values, torch.tensor(REFERENCE_QUANTILES, dtype=values.dtype)).tolist()
    return dict(zip(map("{:g}".format, REFERENCE_QUANTILES), quantiles, strict=True))


def _fit_of(outcome: Predictive, answers: Tensor) -> Fit:
    values = scores(outcome, answers)
    return Fit(nll=values["nll"], ece=values["ece"])


def _abstention(
    fitted: Predictive, fit_answers: Tensor, outcome: Predictive, answers: Tensor, options: Options
) -> Abstention | None:
    if options.target_risk is None:
        return None
    mistakes = fitted.probabilities.argmax(-1) != fit_answers
    candidates = doubts(fitted)
    score = min(candidates, key=lambda name: aurc(candidates[name], mistakes))
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
