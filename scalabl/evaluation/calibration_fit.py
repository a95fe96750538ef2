"""Posterior scale and temperature from labelled rows, and the checks that keep them at 1 where the rows cannot tell.

Pure functions of logits. Which rows are used for what, and the thresholds, are in `calibration`.

Rows that are easy or few have a lowest NLL far from 1 by chance: if every row is answered right, the lowest NLL is at the
smallest temperature. Four rules keep such a fit out of an adapter:

* At least `MIN_ERRORS` rows must be answered wrong. The error rate is what a temperature is learned from, and without
  errors it has no lower limit.
* A normal prior on ln T and ln tau around 0 pulls few rows towards 1. It cannot replace the rule above: with 57 rows, all
  right with a mean confidence of 0.62, the fit is T = 0.14, and still T = 0.65 with a prior five times as narrow, which
  would spoil honest fits. On the 250 rows that fit the example's intent router it moves T from 1.44 to 1.39 and tau from
  0.38 to 0.45, which differ by 0.0001 nats per row.
* The fit must make its rows more likely by more than the standard error. A gain by chance costs new rows about as much as
  it gained on these, so a gain above `HARMFUL` per row must also be `MIN_GAIN` in all, which two parameters reach by chance
  in 5% of data sets, and the other half must confirm it by more than the standard error.
* The other half must not become worse. At a bound of the search it must confirm the fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)
TEMPERATURES = tuple(float(t) for t in np.geomspace(0.1, 10.0, 13))
SCALE_TOLERANCE = 0.2  # of ln tau; NLL is so flat around its minimum that data cannot distinguish closer scales
LN_TEMPERATURE_STD, LN_SCALE_STD = 0.7, 2.0  # standard deviations of the prior
MIN_ERRORS = 8  # among the rows that are fitted
MIN_GAIN = 3.0  # nats, summed over the rows that are fitted
HARMFUL = 0.01  # nats per row: a smaller difference is harmless

LogitsAt = Callable[[float], Tensor]  # posterior scale tau -> logits [N, K, C]


def mixture_nll(logits: Tensor, answers: Tensor, temperature: float) -> float:
    """-mean_n ln mean_k softmax(z_nk / T)[y_n], in nats: logits [N, K, C], answers [N]."""
    return float(row_nll(_gaps(logits, answers), temperature).mean())


def _gaps(logits: Tensor, answers: Tensor) -> Tensor:
    """Each choice's logit minus the answer's, z - z_y: [N, K, C] float64."""
    picked = answers.view(-1, 1, 1).expand(-1, logits.shape[1], 1)
    return logits.double() - logits.double().gather(-1, picked)


def row_nll(gaps: Tensor, temperature: float) -> Tensor:
    """The NLL of each row at a temperature, [N]: gaps [N, K, C] are the logits minus the answer's logit."""
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
    """One posterior scale with its best temperature, and the NLL at that temperature and at T = 1.

    `penalised_nll` is `nll` plus the negative log-density of the prior divided by the number of rows; it is minimised.
    """

    posterior_scale: float
    temperature: float
    nll: float
    nll_untempered: float
    penalised_nll: float


@dataclass(frozen=True)
class ScaleFit:
    """The chosen trial with its logits [N, K, C], and all trials in ascending order of scale.

    Attributes:
        gain: how much less the NLL of each row is than with scale and temperature 1, [N].
    """

    best: Trial
    logits: Tensor
    gain: Tensor
    trials: list[Trial]


def fit_scale(
    logits_at: LogitsAt, answers: Tensor, tolerance: float = SCALE_TOLERANCE, *, with_prior: bool = True
) -> ScaleFit:
    """The most probable posterior scale and temperature, or scale 1 if the difference is within the noise.

    Minimises the mean NLL plus the negative logarithm of the prior divided by the number of rows (a MAP estimate). Each
    scale costs one pass over the data; its temperature is fitted to the logits of that pass. Scale 1 and temperature 1 are
    always tried, so the fit is never worse than none on these rows. NLL often hardly depends on the scale, because the
    temperature makes up for it, while mutual information does. So scale 1, the posterior as trained, stays unless another
    scale is better by more than the standard error of the difference over the rows (one-standard-error rule, Breiman et
    al. 1984).

    Args:
        logits_at: computes logits [N, K, C] for a posterior scale, always with the same draws.
        answers: [N].
        tolerance: of ln tau.
        with_prior: without it the mean NLL alone is minimised.
    """
    prior_weight = 1 / len(answers) if with_prior else 0.0
    trials: list[Trial] = []
    # Logits and each row's NLL: of the best scale, of scale 1 with its best temperature, and of scale 1 with temperature 1.
    logits_and_nll: dict[str, tuple[Tensor, Tensor]] = {}

    def best_nll(scale: float) -> float:
        logits = logits_at(scale)
        gaps = _gaps(logits, answers)
        scale_penalty = _penalty(scale, LN_SCALE_STD) * prior_weight

        def penalised(temperature: float) -> float:
            penalty = _penalty(temperature, LN_TEMPERATURE_STD) * prior_weight
            return float(row_nll(gaps, temperature).mean()) + penalty + scale_penalty

        untempered = row_nll(gaps, 1.0)
        temperature, value = minimise(penalised, TEMPERATURES, 1e-3)
        if value >= penalised(1.0):
            temperature, value = 1.0, penalised(1.0)
        rows = row_nll(gaps, temperature)
        if all(value < trial.penalised_nll for trial in trials):
            logits_and_nll["best"] = logits, rows
        if scale == 1:
            logits_and_nll["unscaled"] = logits, rows
            logits_and_nll["unfitted"] = logits, untempered
        trials.append(Trial(scale, temperature, float(rows.mean()), float(untempered.mean()), value))
        return value

    minimise(best_nll, SCALES, tolerance)
    chosen, choice = min(trials, key=lambda trial: trial.penalised_nll), "best"
    gain = logits_and_nll["unscaled"][1] - logits_and_nll["best"][1]
    if float(gain.mean()) <= standard_error(gain):
        chosen, choice = next(trial for trial in trials if trial.posterior_scale == 1), "unscaled"
    logits, rows = logits_and_nll[choice]
    by_scale = sorted(trials, key=lambda trial: trial.posterior_scale)
    return ScaleFit(chosen, logits, logits_and_nll["unfitted"][1] - rows, by_scale)


def _penalty(value: float, std: float) -> float:
    """The negative log-density of a normal prior on ln(value) with mean 0, without its constant."""
    return (math.log(value) / std) ** 2 / 2


def standard_error(values: Tensor) -> float:
    """The standard error of the mean of values [N]."""
    return float(values.std()) / math.sqrt(len(values))


@dataclass(frozen=True)
class CheckedFit:
    """A scale and temperature that passed the checks, or 1 and 1.

    Attributes:
        summary: one sentence: what was chosen and why.
        few_errors: fewer than `MIN_ERRORS` fit rows are answered wrong, so little can be learned from their errors.
        fit_logits: logits [N, K, C] of the fit rows at the chosen scale.
        before, after: logits [M, K, C] of the other rows at scale 1 and at the chosen scale.
        trials: every scale that was tried, ascending; none if there are too few errors.
    """

    posterior_scale: float
    temperature: float
    summary: str
    few_errors: bool
    fit_logits: Tensor
    before: Tensor
    after: Tensor
    trials: list[Trial]


def checked_fit(fit_at: LogitsAt, fit_answers: Tensor, other_at: LogitsAt, other_answers: Tensor) -> CheckedFit:
    """Fit scale and temperature on some rows, and keep both at 1 where the rows cannot tell or other rows disagree.

    Args:
        fit_at, fit_answers: logits for a posterior scale and answers [N] of the rows to fit.
        other_at, other_answers: the same of rows that take no part in the fit. Whether the fit is kept depends on them.
    """
    unfitted = fit_at(1.0)
    before = other_at(1.0)
    probabilities = torch.softmax(unfitted.double(), -1).mean(1)
    errors, rows = int((probabilities.argmax(-1) != fit_answers).sum()), len(fit_answers)

    def keep_ones(reason: str, trials: list[Trial]) -> CheckedFit:
        summary = f"posterior scale and temperature stay 1: {reason}"
        return CheckedFit(1.0, 1.0, summary, errors < MIN_ERRORS, unfitted, before, before, trials)

    if errors < MIN_ERRORS:
        return keep_ones(
            f"{errors} of the {rows} rows to fit are answered wrong, and fewer than {MIN_ERRORS} errors cannot tell; "
            "give more rows, not easier ones than the adapter will serve",
            [],
        )
    fit = fit_scale(lambda scale: unfitted if scale == 1 else fit_at(scale), fit_answers)
    scale, temperature = fit.best.posterior_scale, fit.best.temperature
    fitted = f"posterior scale {scale:.2f} and temperature {temperature:.2f}"
    gain = float(fit.gain.sum())
    large = gain > HARMFUL * rows
    if float(fit.gain.mean()) <= standard_error(fit.gain) or (large and gain < MIN_GAIN):
        return keep_ones(
            f"{fitted} fit the {rows} rows best, but by {gain:.1f} nats in all, which may be chance",
            fit.trials,
        )
    after = before if scale == 1 else other_at(scale)
    nll_before, nll_after = (row_nll(_gaps(logits, other_answers), t) for logits, t in ((before, 1.0), (after, temperature)))
    worse = nll_after - nll_before
    change = (
        f"NLL of the other {len(worse)} rows {float(nll_before.mean()):.3f} without and {float(nll_after.mean()):.3f} with"
    )
    if float(worse.mean()) > min(HARMFUL, standard_error(worse)):
        return keep_ones(f"{fitted} fit the {rows} rows best, but make the others worse ({change})", fit.trials)
    bound = _at_bound(scale, temperature)
    ended = f"the search ended at its bound, {bound}" if bound else ""
    if (bound or large) and -float(worse.mean()) <= standard_error(worse):
        best = ended or f"{fitted} fit the {rows} rows best"
        return keep_ones(f"{best}, but the others do not clearly confirm it ({change})", fit.trials)
    summary = f"{fitted} from {rows} rows, {errors} of them answered wrong; {change}"
    if bound:
        summary += f"; {ended}: check the rows, and whether training went well"
    return CheckedFit(scale, temperature, summary, False, fit.logits, before, after, fit.trials)


def _at_bound(scale: float, temperature: float) -> str:
    """Which of the two values are at a bound of the search, in words; empty if none."""
    near = [
        f"{name} {value:.2f}"
        for name, value, grid, tolerance in (
            ("posterior scale", scale, SCALES, SCALE_TOLERANCE / 2),
            ("temperature", temperature, TEMPERATURES, 0.01),
        )
        if min(abs(math.log(value / grid[0])), abs(math.log(value / grid[-1]))) < tolerance
    ]
    return " and ".join(near)
