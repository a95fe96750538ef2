"""Draws are pure functions with the right moments; the KL divergence is the integral it stands for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal
from torch.distributions.kl import kl_divergence as torch_kl

from scalabl.model.posterior import (
    DEFAULT_SCHEME,
    SCHEMES,
    SOBOL_SCALARS,
    KLDirection,
    Scheme,
    draw,
    kl_divergence,
    zero_draw,
)

schemes = st.sampled_from(SCHEMES)
seeds = st.integers(0, 2**63 - 1)


@given(seeds, st.integers(1, 40), st.integers(1, 30), schemes)
def test_draws_are_a_pure_function_of_their_arguments(seed: int, samples: int, dimension: int, scheme: Scheme) -> None:
    torch.manual_seed(seed % 1000)
    first = draw(seed, samples, dimension, scheme)
    torch.randn(17)
    second = draw(seed, samples, dimension, scheme)
    assert torch.equal(first.epsilon, second.epsilon)
    assert first.epsilon.shape == (samples, dimension)
    assert first.epsilon.dtype == torch.float32
    assert torch.isfinite(first.epsilon).all()
    assert (first.seed, first.scheme, first.num_samples) == (seed, scheme, samples)


@given(seeds, st.integers(1, 40), st.integers(1, 40), schemes)
def test_fewer_draws_are_a_prefix_of_more(seed: int, few: int, more: int, scheme: Scheme) -> None:
    few, more = sorted((few, more))
    assert torch.equal(draw(seed, few, 7, scheme).epsilon, draw(seed, more, 7, scheme).epsilon[:few])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_another_seed_gives_other_draws(scheme: Scheme) -> None:
    assert not torch.equal(draw(0, 4, 8, scheme).epsilon, draw(1, 4, 8, scheme).epsilon)


# Whoever changes the stream changes every answer of every deployment: these numbers are a promise.
STREAM: dict[Scheme, list[float]] = {
    "gaussian": [1.1362473, -0.5377774, -0.2016436, -0.2394141, -1.3862015, 0.5147407],
    "antithetic": [1.1362473, -0.5377774, -1.1362473, 0.5377774, -0.2016436, -0.2394141],
    "sobol": [-0.8435047, -0.9504879, 1.6013825, 1.2551372, 0.3839946, -0.0410471],
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_stream_is_the_one_that_was_promised(scheme: Scheme) -> None:
    assert draw(7, 3, 2, scheme).epsilon.flatten().tolist() == pytest.approx(STREAM[scheme], abs=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_draws_are_standard_normal(scheme: Scheme) -> None:
    epsilon = draw(0, 4096, 16, scheme).epsilon.double()
    assert epsilon.mean(0).abs().max() < 0.06
    assert (epsilon.std(0) - 1).abs().max() < 0.05
    assert (epsilon.pow(4).mean(0) - 3).abs().max() < 0.8
    correlations = torch.corrcoef(epsilon.T) - torch.eye(16)
    assert correlations.abs().max() < 0.08


def test_sobol_draws_go_on_as_gaussian_ones_beyond_the_scalars_that_torch_has_sobol_numbers_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    wide = draw(3, 256, SOBOL_SCALARS + 302, "sobol").epsilon
    assert torch.equal(wide[:, :SOBOL_SCALARS], draw(3, 256, SOBOL_SCALARS, "sobol").epsilon)
    rest = wide[:, SOBOL_SCALARS:]
    assert torch.equal(rest, draw(3, 256, 302, "gaussian").epsilon)
    assert torch.equal(wide[:9], draw(3, 9, SOBOL_SCALARS + 302, "sobol").epsilon)  # the first ones do not depend on K
    assert torch.corrcoef(torch.cat([wide[:, :302], rest], dim=1).T)[:302, 302:].abs().max() < 0.35
    said = [record.message for record in caplog.records if record.name == "scalabl"]
    assert said == [
        "the adapter has 21503 stochastic scalars: the first 21201 get Sobol draws and the others independent Gaussian draws"
    ]


def test_antithetic_pairs_cancel_exactly() -> None:
    epsilon = draw(5, 10, 6, "antithetic").epsilon
    assert torch.equal(epsilon[0::2], -epsilon[1::2])


def test_sobol_integrates_a_smooth_function_better_than_chance() -> None:
    def error(scheme: Scheme) -> float:
        means = [torch.exp(0.3 * draw(seed, 64, 4, scheme).epsilon.double().sum(1)).mean() for seed in range(30)]
        return float((torch.stack(means) - math.exp(0.5 * 0.09 * 4)).square().mean().sqrt())

    assert error("sobol") < 0.4 * error("gaussian")
    assert error("antithetic") < 0.6 * error("gaussian")


def test_the_zero_draw_is_one_sample_at_the_mean() -> None:
    assert torch.equal(zero_draw(5).epsilon, torch.zeros(1, 5))
    assert DEFAULT_SCHEME in SCHEMES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 1, 1, "gaussian"), r"seed is -1; it must be at least 0 and below 2\*\*63"),
        ((2**63, 1, 1, "gaussian"), "seed is 9223372036854775808"),
        ((0, 0, 1, "gaussian"), "num_samples and dimension must be at least 1, got 0 and 1"),
        ((0, 1, 0, "gaussian"), "got 1 and 0"),
        ((0, 1, 1, "halton"), "draw scheme 'halton' is unknown; use one of gaussian, antithetic, sobol"),
    ],
)
def test_arguments_out_of_range_are_named(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(*arguments)


means = st.lists(st.floats(-2, 2), min_size=1, max_size=4)


def _integral(q: Normal, p: Normal) -> Tensor:
    """KL(q || p) by the trapezoid rule in float64."""
    grid = torch.linspace(-14, 14, 40001, dtype=torch.float64) * q.scale + q.loc
    density = q.log_prob(grid).exp()
    return torch.trapezoid(density * (q.log_prob(grid) - p.log_prob(grid)), grid)


@given(means, st.floats(-2, 1), st.floats(0.2, 3), st.sampled_from(["q_p", "p_q"]))
def test_kl_is_its_integral_and_the_closed_form_of_torch(
    mean: list[float], log_std: float, prior_std: float, direction: KLDirection
) -> None:
    mu = torch.tensor(mean, dtype=torch.float64)
    log_sigma = torch.full_like(mu, log_std)
    q, p = Normal(mu, log_sigma.exp()), Normal(torch.zeros_like(mu), torch.full_like(mu, prior_std))
    first, second = (q, p) if direction == "q_p" else (p, q)
    value = kl_divergence(mu, log_sigma, prior_std, direction)
    assert value.item() == pytest.approx(torch_kl(first, second).sum().item(), rel=1e-9, abs=1e-12)
    one, other = Normal(first.loc[0], first.scale[0]), Normal(second.loc[0], second.scale[0])
    single = kl_divergence(mu[:1], log_sigma[:1], prior_std, direction)
    assert single.item() == pytest.approx(_integral(one, other).item(), rel=1e-6, abs=1e-9)


def test_kl_is_zero_where_the_posterior_is_the_prior() -> None:
    mean, log_std = torch.zeros(5, requires_grad=True), torch.full((5,), math.log(0.7), requires_grad=True)
    for direction in ("q_p", "p_q"):
        value = kl_divergence(mean, log_std, 0.7, direction)
        gradients = torch.autograd.grad(value, [mean, log_std])
        assert abs(value.item()) < 1e-6
        assert all(gradient.abs().max() < 1e-6 for gradient in gradients)


def test_an_unknown_kl_direction_is_named() -> None:
    with pytest.raises(ValueError, match="kl direction 'up' is unknown; use q_p or p_q"):
        kl_divergence(torch.zeros(1), torch.zeros(1), 1.0, "up")  # type: ignore[arg-type]  # that is the point
