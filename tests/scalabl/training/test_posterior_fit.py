"""Fitting a posterior: what is written comes back, with samples and a linearisation of its covariance; and refusals."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from scalabl.config import AdapterConfig
from scalabl.errors import AdapterError, FitError, OutputError
from scalabl.evaluation.encoded import EncodedSet
from scalabl.files.adapter_directory import load_adapter, read_config, read_weights, save_adapter
from scalabl.files.combination import combine
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.model.token_batch import TokenBatch
from scalabl.training import posterior_fit
from scalabl.training.curvature import sum_curvature
from scalabl.training.posterior_fit import (
    FittedPosterior,
    check_output,
    check_size,
    fit_posterior,
    held_out_precision,
    write_fit,
)
from scalabl.training.recipe import FitConfig
from scalabl.uncertainty.laplace import Curvature, prior_scale
from scalabl.uncertainty.linearized import linearize
from tests import tiny

FACTOR = "posterior.covariance_factor"
NOWHERE = Path("nowhere")  # the adapter before the fit


def _rows(count: int = 40, seed: int = 0) -> EncodedSet:
    lengths = [2 + (7 * row) % 11 for row in range(count)]
    answers = torch.arange(count) % 3
    return EncodedSet(tiny.ragged(lengths, seed), answers, torch.full((count,), 3), "rows.jsonl")


def _fit(output: Path, model: ScalaBLModel | None = None, **settings: object) -> FittedPosterior:
    model = tiny.adapted() if model is None else model
    return fit_posterior(model, _rows(), FitConfig.model_validate(settings), output)


def _written(output: Path, **settings: object) -> Path:
    fitted = _fit(output, **settings)
    write_fit(NOWHERE, output, fitted)
    return output


def test_a_full_fit_is_written_and_read_as_format_2(tmp_path: Path) -> None:
    folder = _written(tmp_path / "fitted", max_rows=25)
    content = json.loads((folder / "adapter_config.json").read_text())
    assert (content["format_version"], content["covariance"]) == (2, "full")
    record = content["posterior_fit"]
    assert (record["rows"], record["total_rows"], record["data"]) == (25, 40, "rows.jsonl")
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    factor = read_weights(folder)[FACTOR]
    size = tiny.adapted().num_stochastic_parameters
    assert list(factor.shape) == [size, size]
    assert not factor.triu(1).any()


def test_the_posterior_is_the_inverse_of_curvature_and_prior(tmp_path: Path) -> None:
    model, rows = tiny.adapted(), _rows()
    weights = _fit(tmp_path, model, prior_precision=2.5, max_rows=20, seed=3).weights
    chosen = posterior_fit.chosen_rows(40, 20, 3)
    matrix = 2 * sum_curvature(model, rows, chosen, "full", seed=3).matrix[0]
    scale = prior_scale(model.posterior().mean.detach(), model.config.r)[0]
    expected = torch.linalg.inv(matrix + 2.5 * torch.diag(scale**-2))
    factor = weights[FACTOR].double()
    assert torch.allclose(factor @ factor.T, expected, rtol=1e-3, atol=1e-5 * float(expected.max()))
    sigma = torch.cat([weights[f"{name}.s_log_std"] for name in model.adapted]).exp()
    assert torch.allclose(sigma.double(), expected.diagonal().sqrt(), rtol=1e-4)


def test_samples_have_the_covariance_of_the_adapter(tmp_path: Path) -> None:
    model = load_adapter(tiny.base_model(), _written(tmp_path / "fitted", prior_precision=1.0))
    model.config = model.config.model_copy(update={"posterior_scale": 0.5})
    s = model.sample(model.draws(8192).epsilon).double()
    factor = read_weights(tmp_path / "fitted")[FACTOR].double()
    expected = 0.25 * factor @ factor.T
    found = torch.cov(s.T)
    scale = expected.diagonal().sqrt()
    assert ((found - expected) / torch.outer(scale, scale)).abs().max() < 0.06
    off = (expected / torch.outer(scale, scale)).fill_diagonal_(0)
    assert off.abs().max() > 0.3, "a covariance without correlations would show nothing"
    means = torch.cat([layer.s_mean for layer in model.adapted.values()])
    assert torch.allclose(model.sample(torch.zeros(1, len(factor)))[0], means)


def test_a_diagonal_fit_has_no_factor(tmp_path: Path) -> None:
    folder = _written(tmp_path / "fitted", covariance="diagonal", prior_precision=1.0)
    assert FACTOR not in read_weights(folder)
    assert read_config(folder).covariance == "diagonal"
    assert "covariance" not in json.loads((folder / "adapter_config.json").read_text())
    model = load_adapter(tiny.base_model(), folder)
    matrix = sum_curvature(tiny.adapted(), _rows(), torch.arange(40), "full").matrix[0]
    sigma = torch.cat([layer.s_log_std.exp() for layer in model.adapted.values()]).double()
    scale = prior_scale(model.posterior().mean.detach(), model.config.r)[0]
    assert torch.allclose(sigma, (matrix.diagonal() + scale**-2).rsqrt(), rtol=1e-3)


def test_a_factor_that_is_diagonal_answers_as_independent_scalars_do(tmp_path: Path) -> None:
    fitted = _fit(tmp_path, covariance="diagonal", prior_precision=1.0)
    plain = tmp_path / "plain"
    write_fit(NOWHERE, plain, fitted)
    model = load_adapter(tiny.base_model(), plain)
    sigma = torch.cat([layer.s_log_std.exp() for layer in model.adapted.values()])
    weights = {**fitted.weights, FACTOR: torch.diag(sigma)}
    full = FittedPosterior(fitted.config.model_copy(update={"covariance": "full"}), weights, fitted.fit, [])
    write_fit(NOWHERE, tmp_path / "full", full)
    other = load_adapter(tiny.base_model(), tmp_path / "full")
    batch = TokenBatch.of(tiny.ragged())
    assert torch.allclose(model.logits(batch, model.draws(6)), other.logits(batch, other.draws(6)), atol=1e-5)
    one, two = linearize(model, batch), linearize(other, batch)
    assert torch.allclose(one.covariance(), two.covariance(), rtol=1e-5)
    shares = zip(one.layer_shares().values(), two.layer_shares().values(), strict=True)
    assert all(torch.allclose(*pair, atol=1e-6) for pair in shares)


def test_the_linearisation_of_a_head_alone_is_exact_with_a_full_covariance(tmp_path: Path) -> None:
    """There the logits are linear in s, so they are Gaussian with the covariance J Sigma J^T."""
    adapter = tiny.adapted(target_modules=("lm_head",))
    write_fit(NOWHERE, tmp_path / "fitted", _fit(tmp_path, adapter, prior_precision=1.0))
    model = load_adapter(tiny.base_model(), tmp_path / "fitted")
    batch = TokenBatch.of(tiny.ragged())
    linear, draws = linearize(model, batch), model.draws(4096)
    z = model.logits(batch, draws)
    assert (linear.logits_at(draws) - z).abs().max() <= 1e-4
    sampled = torch.stack([torch.cov(of_input.double().T) for of_input in z])
    covariance = linear.covariance()[:, 0]
    assert (sampled - covariance).abs().max() <= 0.03 * covariance.abs().max()
    assert torch.softmax(z.double(), -1).mean(1).sub(linear.predictive().probabilities).abs().max() <= 2e-3


def test_a_mixture_is_fitted_member_by_member(tmp_path: Path) -> None:
    mixture = tiny.mixture(members=2)
    write_fit(NOWHERE, tmp_path / "fitted", _fit(tmp_path, mixture, prior_precision=1.0))
    model = load_adapter(tiny.base_model(), tmp_path / "fitted")
    factor = read_weights(tmp_path / "fitted")[FACTOR]
    size = model.num_stochastic_parameters
    assert list(factor.shape) == [2, size, size]
    batch, draws = TokenBatch.of(tiny.ragged()), model.draws(6)
    z = model.logits(batch, draws)
    for member in range(2):
        alone = tiny.adapted()
        with torch.no_grad():
            for name, parameter in alone.adapter_parameters().items():
                parameter.copy_(mixture.adapter_parameters()[name][member])
        own = _fit(tmp_path / f"{member}", alone, prior_precision=1.0)
        assert torch.allclose(factor[member], own.weights[FACTOR], rtol=1e-2, atol=1e-3)
        write_fit(NOWHERE, tmp_path / f"alone-{member}", own)
        single = load_adapter(tiny.base_model(), tmp_path / f"alone-{member}")
        expected = single.logits(batch, draws.of_member(member))
        assert torch.allclose(z[:, draws.member == member], expected, atol=2e-3)
    combine([tmp_path / f"alone-{member}" for member in range(2)], tmp_path / "combined")
    assert read_config(tmp_path / "combined").covariance == "full"
    combined = load_adapter(tiny.base_model(), tmp_path / "combined")
    assert torch.allclose(combined.logits(batch, draws), z, atol=2e-3)
    linear = linearize(model, batch)
    assert list(linear.covariance().shape) == [4, 2, 3, 3]
    shares = torch.stack(list(linear.layer_shares().values()))
    assert torch.allclose(shares.sum(0), torch.ones(4, dtype=torch.float64))


def test_posteriors_of_different_form_do_not_combine(tmp_path: Path) -> None:
    full, diagonal = _written(tmp_path / "full"), _written(tmp_path / "diagonal", covariance="diagonal")
    with pytest.raises(AdapterError, match='its covariance is "diagonal" and that of the other is "full"'):
        combine([full, diagonal], tmp_path / "combined")


def broken(folder: Path, change: Callable[[Tensor], Tensor | None]) -> Path:
    """The adapter with another factor, or none."""
    weights = read_weights(folder)
    factor = change(weights.pop(FACTOR))
    save_adapter(folder, read_config(folder), weights if factor is None else {**weights, FACTOR: factor})
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: None, "is missing from adapter_model.safetensors"),
        (lambda f: f[:-1], "has shape [19, 20]; the base model and adapter_config.json require [20, 20]"),
        (lambda f: f * math.nan, "has values that are not finite"),
        (lambda f: f + f.T, "has values above its diagonal; it must be lower triangular"),
        (lambda f: f - 2 * torch.diag(f.diagonal()), "has a diagonal that is not above 0"),
        (lambda f: 2 * f, "has other standard deviations than the s_log_std of the modules"),
    ],
)
def test_a_factor_that_is_none_is_refused_by_name(
    tmp_path: Path, change: Callable[[Tensor], Tensor | None], message: str
) -> None:
    folder = broken(_written(tmp_path / "fitted"), change)
    with pytest.raises(AdapterError, match=re.escape(f"tensor '{FACTOR}' {message}")):
        load_adapter(tiny.base_model(), folder)


def test_a_factor_beside_a_diagonal_covariance_is_refused(tmp_path: Path) -> None:
    folder = _written(tmp_path / "fitted")
    save_adapter(folder, read_config(folder).model_copy(update={"covariance": "diagonal"}), read_weights(folder))
    with pytest.raises(AdapterError, match=r"needs the covariance 'full', and adapter_config.json has 'diagonal'"):
        load_adapter(tiny.base_model(), folder)


def test_layer_shares_add_up_with_a_full_covariance(tmp_path: Path) -> None:
    model = load_adapter(tiny.base_model(), _written(tmp_path / "fitted", prior_precision=1.0))
    linear = linearize(model, TokenBatch.of(tiny.ragged()))
    shares = linear.layer_shares()
    assert list(shares) == list(model.adapted)
    assert torch.allclose(torch.stack(list(shares.values())).sum(0), torch.ones(4, dtype=torch.float64))
    # the covariance of a layer's part with the whole, from samples of the scalars
    draws, factor = model.draws(8192), read_weights(tmp_path / "fitted")[FACTOR].double()
    deviations = draws.epsilon.double() @ factor.T
    slopes, p = linear.jacobian[:, 0], torch.softmax(linear.mean[:, 0], -1)
    for name, columns in linear.layers.items():
        parts = [deviations[:, index] @ slopes[..., index].mT for index in (columns, slice(None))]
        moved = [p.unsqueeze(1) * (part - (p.unsqueeze(1) * part).sum(-1, keepdim=True)) for part in parts]
        covariance = ((moved[0] - moved[0].mean(1, keepdim=True)) * moved[1]).sum(-1).mean(1)
        assert torch.allclose(covariance / moved[1].var(1).sum(-1), shares[name], atol=0.05)


def test_a_fitted_adapter_forgets_its_calibration_and_keeps_its_means(tmp_path: Path) -> None:
    model = tiny.adapted(posterior_scale=2.0, temperature=1.7)
    fitted = _fit(tmp_path, model, covariance="diagonal")
    assert (fitted.config.posterior_scale, fitted.config.temperature, fitted.config.calibration) == (1.0, 1.0, None)
    for name, parameter in model.adapter_parameters().items():
        assert torch.equal(fitted.weights[name], parameter) != name.endswith(".s_log_std")


@pytest.mark.parametrize("seed", [0, 1])
def test_a_fit_does_not_depend_on_the_posterior_before_it(tmp_path: Path, seed: int) -> None:
    first = _written(tmp_path / "first", seed=seed)
    again = fit_posterior(load_adapter(tiny.base_model(), first), _rows(), FitConfig(seed=seed), tmp_path / "again")
    assert torch.allclose(again.weights[FACTOR], read_weights(first)[FACTOR], rtol=1e-3, atol=1e-5)


def test_held_out_rows_choose_a_precision_of_a_low_nll() -> None:
    model, rows = tiny.adapted(), _rows()
    scale = prior_scale(model.posterior().mean.detach(), model.config.r)
    curvature = Curvature.of(sum_curvature(model, rows, torch.arange(40), "full").matrix, scale)
    chosen = held_out_precision(model, _rows(60, seed=5), curvature)
    # The answers are random, so the wider the posterior the better.
    assert chosen < 1e-2
    tiny.prefer(model, [0], by=8.0)
    right = EncodedSet(rows.sequences, torch.zeros_like(rows.answers), rows.num_choices)
    curvature = Curvature.of(sum_curvature(model, right, torch.arange(40), "full").matrix, scale)
    assert held_out_precision(model, right, curvature) > 1e2


def test_too_many_scalars_are_refused_with_the_remedy() -> None:
    with pytest.raises(FitError, match=r"21504 scalars, .* supported up to 4096; add --covariance diagonal"):
        check_size(21504, FitConfig())
    check_size(21504, FitConfig(covariance="diagonal"))


def test_a_search_that_ends_at_its_bound_says_so(tmp_path: Path) -> None:
    model = tiny.adapted()
    tiny.prefer(model, [0], by=200.0)
    fitted = _fit(tmp_path, model, evidence=True)
    assert "ended at its bound" in fitted.notes[0]
    other = _fit(tmp_path / "other", evidence=True)
    assert (other.notes, other.fit.precision_from) == ([], "evidence")


def test_folders_that_hold_something_are_refused(tmp_path: Path) -> None:
    lora, full, state = tmp_path / "lora", tmp_path / "full", tmp_path / "state"
    for folder in (lora, full, state / "checkpoints"):
        folder.mkdir(parents=True)
    (full / "notes.txt").write_text("mine")
    (state / "checkpoints" / "posterior_fit.safetensors").write_text("of a fit that was cut short")
    with pytest.raises(OutputError, match="is a LoRA, which stays as it is; name another folder with --output"):
        check_output(lora, lora, from_lora=True, overwrite=True)
    with pytest.raises(OutputError, match="is not empty; choose another --output, or add --overwrite"):
        check_output(lora, full, from_lora=True, overwrite=False)
    check_output(lora, full, from_lora=True, overwrite=True)
    check_output(lora, state, from_lora=True, overwrite=False)
    check_output(full, full, from_lora=False, overwrite=False)


def test_version_1_has_no_covariance() -> None:
    fields = tiny.config_for().model_dump() | {"covariance": "full"}
    with pytest.raises(ValueError, match="covariance is full, which needs format_version 2"):
        AdapterConfig.model_validate(fields)
