"""The linearisation against differences, the closed form of the head, and many samples; and what it gives as a control."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from scalabl.model.derivatives import GRADIENT_TOKENS, jacobian
from scalabl.model.posterior import Draws, Scheme
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.model.token_batch import TokenBatch
from scalabl.uncertainty.linearized import controlled, linearize
from scalabl.uncertainty.predictive import Predictive, predictive
from tests import tiny

BATCH = TokenBatch.of(tiny.ragged())


def _adapted(sigma: float, name: str = "llama", **changes: object) -> ScalaBLModel:
    model = tiny.adapted(name, **changes)
    with torch.no_grad():
        for layer in model.adapted.values():
            layer.s_log_std.add_(math.log(sigma / 0.3))  # tiny.fill has 0.3 in the middle
    return model


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gemma3"])
def test_the_jacobian_is_the_slope_of_the_logits(name: str) -> None:
    model = _adapted(0.3, name, posterior_scale=0.7)
    linear = linearize(model, BATCH)
    size = model.num_stochastic_parameters
    step = 0.02
    both = Draws(0, "gaussian", torch.cat([step * torch.eye(size), -step * torch.eye(size)]))
    z = model.logits(BATCH, both).double()
    slopes = ((z[:, :size] - z[:, size:]) / (2 * step)).transpose(1, 2)  # by epsilon: tau sigma dz/ds
    assert (linear.scaled_jacobian[:, 0] - slopes).abs().max() <= 2e-3 * slopes.abs().max()
    assert (linear.mean - model.logits(BATCH, model.mean_draw())).abs().max() <= 1e-5


def test_for_an_adapter_of_the_head_alone_it_is_exact() -> None:
    model = _adapted(0.5, target_modules=("lm_head",))
    linear, draws = linearize(model, BATCH), model.draws(32)
    assert (linear.logits_at(draws) - model.logits(BATCH, draws)).abs().max() <= 1e-5
    head = model.adapted["lm_head"]
    hidden: list[Tensor] = []
    hook = head.base.register_forward_hook(lambda _, inputs, __: hidden.append(inputs[0]))
    model.logits(BATCH, model.mean_draw())
    hook.remove()
    spread = head.s_log_std.exp() * (hidden[0] @ head.lora_A.T)  # [B, R]
    columns = model.config.scaling * head.lora_B * spread.unsqueeze(1)  # [B, C, R]
    closed = columns @ columns.transpose(1, 2)  # scaling^2 B diag(sigma^2 (A h)^2) B^T
    assert torch.allclose(linear.covariance()[:, 0], closed.double(), rtol=1e-4, atol=1e-7)


def test_its_samples_have_its_mean_and_covariance() -> None:
    linear = linearize(_adapted(0.2), BATCH)
    z = linear.samples(4096)
    assert (z.mean(1) - linear.mean[:, 0]).abs().max() <= 0.01 * linear.covariance().diagonal(dim1=2, dim2=3).sqrt().max()
    centred = z - z.mean(1, keepdim=True)
    found = centred.transpose(1, 2) @ centred / 4096
    assert (found - linear.covariance()[:, 0]).abs().max() <= 0.03 * linear.covariance().abs().max()
    assert torch.equal(linear.samples(4096), z)


def _rms(one: Predictive, other: Predictive, field: str) -> float:
    return float((getattr(one, field) - getattr(other, field)).square().mean().sqrt())


@pytest.mark.parametrize("field", ["probabilities", "mutual_information"])
def test_where_sigma_is_small_it_beats_many_samples(field: str) -> None:
    model = _adapted(0.03, temperature=1.5)
    reference = predictive(model.logits(BATCH, model.draws(4096, 99)), 1.5)
    found = _rms(linearize(model, BATCH).predictive(1.5), reference, field)
    sampled = [
        _rms(predictive(model.logits(BATCH, model.draws(64, seed, "gaussian")), 1.5), reference, field) for seed in range(8)
    ]
    assert found < 0.5 * sum(sampled) / 8


def test_its_error_is_not_one_of_sampling() -> None:
    error = linearize(_adapted(0.03), BATCH).predictive().standard_error
    assert bool(error.probabilities.isnan().all())
    assert bool(error.mutual_information.isnan().all())


def test_layer_shares_add_up_and_follow_sigma() -> None:
    model = _adapted(0.1)
    shares = linearize(model, BATCH).layer_shares()
    assert list(shares) == list(model.adapted)
    assert torch.allclose(torch.stack(list(shares.values())).sum(0), torch.ones(4, dtype=torch.float64))
    with torch.no_grad():
        for name, layer in model.adapted.items():
            layer.s_log_std.add_(0.0 if name == "lm_head" else -12.0)
    assert bool((linearize(model, BATCH).layer_shares()["lm_head"] > 0.999).all())


def test_layer_shares_are_of_the_variance_of_the_probabilities() -> None:
    model = _adapted(0.01)
    linear = linearize(model, BATCH)
    draws = model.draws(4096)
    whole = predictive(linear.logits_at(draws)).sample_probabilities.var(1).sum(-1)
    for name, columns in linear.layers.items():
        only = Draws(0, "sobol", torch.zeros_like(draws.epsilon))
        only.epsilon[:, columns] = draws.epsilon[:, columns]
        part = predictive(linear.logits_at(only)).sample_probabilities.var(1).sum(-1)
        assert torch.allclose(part / whole, linear.layer_shares()[name], atol=0.03)


def test_choices_that_are_negligible_cost_no_row() -> None:
    model = _adapted(0.03)
    full, rows = linearize(model, BATCH), []
    hook = model.adapted["lm_head"].register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    lean = linearize(model, BATCH, negligible=1.0)  # which leaves the two most probable
    hook.remove()
    assert rows == [4, 8]
    kept = torch.zeros(4, 1, 3, dtype=torch.bool).scatter_(2, full.mean.topk(2, dim=-1).indices, True)
    assert torch.allclose(lean.scaled_jacobian[kept], full.scaled_jacobian[kept], atol=1e-6)
    assert not lean.scaled_jacobian[~kept].any()
    assert (lean.mean - full.mean).abs().max() <= 1e-5


def _rows_of_passes(model: ScalaBLModel) -> list[int]:
    rows: list[int] = []
    model.adapted["lm_head"].register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    return rows


def test_a_graph_holds_a_bounded_number_of_tokens() -> None:
    model = _adapted(0.3)
    length, inputs = 120, 20
    batch = TokenBatch.of(tiny.ragged([length] * inputs))
    rows = _rows_of_passes(model)
    linear = linearize(model, batch)
    assert max(rows) * length <= GRADIENT_TOKENS
    assert sum(rows) == 3 * inputs
    mean, slopes, _ = jacobian(model, batch, torch.ones(inputs, 3, dtype=torch.bool), max_tokens=3 * inputs * length)
    assert rows[-1] == 3 * inputs
    deviation = torch.cat([layer.s_log_std.exp() for layer in model.adapted.values()])
    assert (linear.mean - mean).abs().max() <= 1e-5
    assert (linear.scaled_jacobian - slopes * deviation).abs().max() <= 1e-6 * slopes.abs().max()


@pytest.mark.parametrize(("max_tokens", "expected"), [(1, [1] * 8), (14, [1] * 8), (42, [3, 3, 2]), (10_000, [8])])
def test_rows_of_one_input_may_be_of_several_graphs(max_tokens: int, expected: list[int]) -> None:
    model = _adapted(0.3)
    active = torch.tensor([[True, False, True], [True, True, True], [False, True, False], [True, False, True]])
    mean, slopes, states = jacobian(model, BATCH, active, max_tokens=10_000)
    rows = _rows_of_passes(model)
    found_mean, found, found_states = jacobian(model, BATCH, active, max_tokens=max_tokens)
    assert rows == expected
    assert torch.allclose(found_mean, mean, atol=1e-5)
    assert torch.allclose(found_states, states, atol=1e-4)
    assert (found - slopes).abs().max() <= 1e-6 * slopes.abs().max()


def test_the_spread_is_relative_to_the_mean_and_scaled() -> None:
    model = _adapted(0.1, posterior_scale=2.0)
    ratios = torch.cat([2 * layer.s_log_std.exp() / layer.s_mean.abs() for layer in model.adapted.values()])
    assert model.posterior().relative_spread == pytest.approx(float(ratios.median()), rel=1e-5)


@pytest.mark.parametrize(("sigma", "scheme"), [(0.05, "gaussian"), (0.4, "gaussian"), (0.4, "antithetic")])
def test_controlled_samples_are_unbiased_and_know_their_error(sigma: float, scheme: Scheme) -> None:
    model = _adapted(sigma)
    linear, repeats = linearize(model, BATCH), 100
    reference = predictive(model.logits(BATCH, model.draws(8192, 77)))
    plain, fixed = [], []
    for seed in range(repeats):
        draws = model.draws(16, seed, scheme)
        logits = model.logits(BATCH, draws)
        plain.append(predictive(logits))
        fixed.append(controlled(logits, linear, draws))
    p = torch.stack([each.probabilities for each in fixed])
    errors = torch.stack([each.standard_error.probabilities for each in fixed])
    deviation = (p - reference.probabilities) / errors
    # the mean over the seeds, in units of its own standard error, for each input and choice
    assert float(((p.mean(0) - reference.probabilities) / (p.std(0) / math.sqrt(repeats))).abs().max()) < 4.5
    assert 0.8 < float(deviation.std()) < 1.4
    if sigma < 0.1:
        spread = torch.stack([each.probabilities for each in plain]).std(0).mean()
        assert float(p.std(0).mean()) < 0.35 * float(spread)
    for each in fixed:
        assert bool((each.mutual_information >= 0).all())
        assert torch.allclose(each.entropy, each.expected_entropy + each.mutual_information)


def test_the_control_of_an_exact_linearisation_leaves_no_error() -> None:
    model = _adapted(0.5, target_modules=("lm_head",))
    draws = model.draws(4, 3, "gaussian")
    linear = linearize(model, BATCH)
    found = controlled(model.logits(BATCH, draws), linear, draws)
    exact = linear.predictive()
    assert torch.allclose(found.probabilities, exact.probabilities, atol=1e-5)
    assert torch.allclose(found.mutual_information, exact.mutual_information, atol=1e-5)
    assert float(found.standard_error.probabilities.max()) < 1e-5


def test_a_pass_with_derivatives_leaves_nothing_behind() -> None:
    model = _adapted(0.3)
    before = model.logits(BATCH, model.draws(4))
    linearize(model, BATCH)
    assert torch.equal(model.logits(BATCH, model.draws(4)), before)
    assert all(parameter.grad is None for parameter in model.parameters())
