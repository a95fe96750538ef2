"""Fits q(s) around the mean of a trained adapter, without training: Laplace's approximation over all scalars at once.

The curvature of the rows is summed in `curvature`; the mathematics is in `uncertainty.laplace`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scalabl.config import AdapterConfig, PosteriorFit, PrecisionOrigin
from scalabl.errors import FitError, OutputError
from scalabl.evaluation.calibration_fit import minimise
from scalabl.evaluation.encoded import EncodedSet
from scalabl.files.output_folder import CHECKPOINTS, FIT_STATE, check_unused, replace_adapter, write_adapter
from scalabl.model.posterior import FACTOR, Posterior
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.model.token_batch import TokenBatch
from scalabl.passes.batches import batches
from scalabl.training.curvature import BATCH_TOKENS, SavedSums, sum_curvature
from scalabl.training.recipe import FitConfig
from scalabl.training.run_folder import Rows, fingerprint_of
from scalabl.uncertainty.laplace import PRECISIONS, Curvature, prior_scale
from scalabl.uncertainty.linearized import NEGLIGIBLE, Linearization, slopes

FULL_LIMIT = 4096  # scalars up to which the covariance may be full: 67 MB in the adapter, and minutes to factorise
HELD_OUT_ROWS = 500
HELD_OUT_BYTES = 2**30  # of derivatives of held-out rows
HELD_OUT_DRAWS = 256
# The prior's variance is then mu^2, its maximum-likelihood estimate from the scalar itself. The evidence takes wider priors
# where many scalars matter little, since it reads means that the rows did not determine as draws of the prior.
UNIT_PRECISION = 1.0
GRID = tuple(float(x) for x in np.geomspace(1e-4, 1e4, 9))


@dataclass(frozen=True)
class FittedPosterior:
    """The outcome of `fit_posterior`.

    Attributes:
        config: the adapter's configuration with the record of the fit, and without a calibration.
        weights: the adapter's tensors.
        notes: what a user should know, one sentence each.
    """

    config: AdapterConfig
    weights: dict[str, Tensor]
    fit: PosteriorFit
    notes: list[str]

    @property
    def report(self) -> dict[str, Any]:
        """The numbers of the fit, for people and programs."""
        sigma, mean = (
            torch.cat([tensor.flatten() for name, tensor in self.weights.items() if name.endswith(kind)])
            for kind in (".s_log_std", ".s_mean")
        )
        spread = float((sigma.exp() / mean.abs().clamp_min(1e-12)).median())
        return {**self.fit.model_dump(mode="json"), "scalars": mean.numel(), "median_sigma_over_mean": spread}


def check_size(scalars: int, settings: FitConfig, option: str = "--covariance") -> None:
    """Check that a covariance of this form is affordable for so many scalars.

    Args:
        option: what sets the form, for the message.

    Raises:
        FitError: too many for a full covariance.
    """
    if settings.covariance == "full" and scalars > FULL_LIMIT:
        raise FitError(
            f"the adapter has {scalars} scalars, and a full covariance is supported up to {FULL_LIMIT}; "
            f"add {option} diagonal"
        )


def fit_posterior(
    model: ScalaBLModel,
    encoded: EncodedSet,
    settings: FitConfig,
    output: Path,
    *,
    held_out: EncodedSet | None = None,
    overwrite: bool = False,
    on_progress: Callable[[int], object] | None = None,
) -> FittedPosterior:
    """Fit q(s) = N(mu, (N / n H + precision D)^-1) around the adapter's mu, with H from n of the N training rows.

    D is diag(scale)^-2, with the scale of each scalar by `prior_scale`. The likelihood is that of training: without the
    adapter's temperature. Nothing is written but the state of the computation, to `output`/checkpoints; `write_fit` removes
    it.

    Args:
        held_out: rows that were not trained on, to choose the prior precision by their NLL if the settings do not.
        overwrite: ignore the state of another fit in `output`.
        on_progress: called with a number of training rows.

    Raises:
        FitError: too many scalars for a full covariance.
        OutputError: `output` has the state of another fit, or cannot be written.
    """
    check_size(model.num_stochastic_parameters, settings)
    model.eval()
    total = len(encoded.sequences)
    rows = chosen_rows(total, settings.max_rows, settings.seed)
    saved = SavedSums(_state_file(output), _made_from(model, encoded, settings))
    if overwrite:
        saved.remove()
    sums = sum_curvature(model, encoded, rows, settings.covariance, seed=settings.seed, saved=saved, on_progress=on_progress)
    whole = sums.scaled(total / len(rows))
    mean = model.posterior().mean.detach().double().cpu()
    curvature = Curvature.of(whole.matrix, prior_scale(mean, model.config.r))
    origin: PrecisionOrigin
    if settings.prior_precision is not None:
        precision, origin = settings.prior_precision, "given"
    elif settings.evidence:
        precision, origin = curvature.likeliest_precision(mean), "evidence"
    elif held_out is not None:
        precision, origin = held_out_precision(model, held_out, curvature), "held_out"
    else:
        precision, origin = UNIT_PRECISION, "unit"
    fit = PosteriorFit(
        covariance=settings.covariance,
        data=encoded.name,
        rows=len(rows),
        total_rows=total,
        prior_precision=precision,
        precision_from=origin,
        log_evidence=curvature.log_evidence(precision, mean, whole.log_likelihood),
        determined_scalars=curvature.determined(precision),
    )
    notes = []
    if model.config.calibration is not None:
        notes.append("the calibration was made for the former posterior and is gone; run scalabl calibrate again")
    if model.config.novelty is not None:
        notes.append(
            "the novelty reference was made for the former posterior and is gone; scalabl calibrate --reference makes one"
        )
    bounds = {"evidence": PRECISIONS, "held_out": (GRID[0], GRID[-1])}.get(origin, ())
    if any(abs(math.log(precision / bound)) < 0.1 for bound in bounds):
        notes.append(
            f"the search for the prior precision ended at its bound, {precision:.3g}: the rows hardly tell. "
            "Give more rows, or set --prior-precision"
        )
    return _fitted(model, fit, curvature.factor(precision), notes)


def chosen_rows(total: int, most: int, seed: int) -> Tensor:
    """Indices of at most `most` of `total` rows, chosen at random, in ascending order."""
    return torch.from_numpy(np.sort(np.random.default_rng(seed).permutation(total)[:most]))


def _state_file(output: Path) -> Path:
    return output / CHECKPOINTS / FIT_STATE


def check_output(adapter: Path, output: Path, *, from_lora: bool, overwrite: bool) -> None:
    """Check that a fit may be written to a folder: it is the adapter itself, or free, or has an interrupted fit alone.

    Args:
        from_lora: the adapter is a LoRA of PEFT, which is never replaced.

    Raises:
        OutputError: it may not.
    """
    in_place = output.resolve() == adapter.resolve()
    if from_lora and in_place:
        raise OutputError(f"{adapter} is a LoRA, which stays as it is; name another folder with --output")
    check_unused(output, overwrite=overwrite or in_place or _holds_state_alone(output))


def _holds_state_alone(output: Path) -> bool:
    files = {path for path in output.rglob("*") if path.is_file()} if output.is_dir() else set()
    return files == {_state_file(output)}


def forget_state(output: Path) -> None:
    """Remove the state of a fit in `output`."""
    SavedSums(_state_file(output), {}).remove()


def write_fit(adapter: Path, output: Path, fitted: FittedPosterior, *, overwrite: bool = False) -> None:
    """Write a fitted adapter, and remove the state of the computation.

    If `output` is the folder of `adapter`, its two files are replaced and everything else stays.

    Raises:
        OutputError: the folder cannot be written, or is not free.
    """
    if output.resolve() == adapter.resolve():
        replace_adapter(output, fitted.config, fitted.weights)
    else:
        overwrite = overwrite or _holds_state_alone(output)
        write_adapter(output, fitted.config, fitted.weights, overwrite=overwrite)
    forget_state(output)


def _made_from(model: ScalaBLModel, encoded: EncodedSet, settings: FitConfig) -> dict[str, str]:
    """What decides the sums, by the names that a message has for them."""
    digest = hashlib.sha256(model.config.task.model_dump_json().encode())
    for name, parameter in model.adapter_parameters().items():
        if not name.endswith((".s_log_std", ".covariance_factor")):
            digest.update(f"{name} {list(parameter.shape)} {model.config.scaling}\n".encode())
            digest.update(parameter.detach().float().cpu().contiguous().numpy().data)
    rows = Rows.of(encoded)
    return {
        "adapter": digest.hexdigest(),
        "base model": fingerprint_of(model.base),
        "rows": f"{rows.tokens_sha256} {rows.answers_sha256}",
        "options": f"{settings.covariance} {settings.max_rows} {settings.seed}",
    }


def _fitted(model: ScalaBLModel, fit: PosteriorFit, factor: Tensor, notes: list[str]) -> FittedPosterior:
    """The adapter with sigma, and the factor if it is full: [M, P, P] or [M, P]."""
    full = factor.dim() == 3
    sigma = factor.square().sum(-1).sqrt() if full else factor  # [M, P]
    weights = {name: parameter.detach().cpu() for name, parameter in model.adapter_parameters().items()}
    size = model.config.r
    for index, name in enumerate(model.adapted):
        key = f"{name}.s_log_std"
        weights[key] = sigma[:, index * size : (index + 1) * size].log().float().view(weights[key].shape)
    weights.pop(FACTOR, None)
    if full:
        weights[FACTOR] = (factor if model.members > 1 else factor[0]).float()
    changes = {
        "format_version": 2,
        "covariance": fit.covariance,
        "posterior_scale": 1.0,
        "temperature": 1.0,
        "calibration": None,
        "novelty": None,
        "posterior_fit": fit,
    }
    return FittedPosterior(model.config.model_copy(update=changes), weights, fit, notes)


def held_out_precision(model: ScalaBLModel, encoded: EncodedSet, curvature: Curvature) -> float:
    """The prior precision with the lowest NLL of the linearised predictive on rows that were not trained on.

    Up to `HELD_OUT_ROWS` rows are used. Choices whose probability is negligible are not linearised.
    """
    slope_bytes = 8 * model.num_choices * curvature.values.numel()
    limit = max(1, min(HELD_OUT_ROWS, HELD_OUT_BYTES // slope_bytes))
    rows = np.random.default_rng(0).permutation(len(encoded.sequences))[:limit].tolist()
    parts = []
    for batch in batches([len(encoded.sequences[row]) for row in rows], 1, BATCH_TOKENS):
        chosen = [rows[index] for index in batch]
        tokens = TokenBatch.of([encoded.sequences[row] for row in chosen])
        mean, jacobian, _ = slopes(model, tokens, choices=encoded.num_choices[chosen].tolist(), negligible=NEGLIGIBLE)
        parts.append((mean, curvature.by_eigenvectors(jacobian), encoded.answers[chosen]))

    def nll(precision: float) -> float:
        log_std = -(curvature.values + precision).log() / 2
        spread = Posterior(torch.zeros_like(log_std), log_std)
        total = 0.0
        for mean, rotated, answers in parts:
            linear = Linearization(mean, rotated, spread, {})
            p = torch.softmax(linear.samples(HELD_OUT_DRAWS), -1).mean(1)
            total -= float(p.gather(1, answers.unsqueeze(1)).clamp_min(1e-300).log().sum())
        return total / len(rows)

    return minimise(nll, GRID, 0.05)[0]
