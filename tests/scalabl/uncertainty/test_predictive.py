"""Probabilities, entropies and mutual information: laws for any logits, and values against 60-digit arithmetic."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Tensor

from scalabl.model.posterior import Scheme
from scalabl.uncertainty.predictive import degrees_of_freedom, predictive

FIELDS = ("probabilities", "entropy", "expected_entropy", "mutual_information")


@st.composite
def logits(draw: DrawFn, min_samples: int = 1) -> Tensor:
    """[B, K, C] of any size up to C = 1000, mild or extreme: up to 1e4 either way, with ties."""
    inputs, samples = draw(st.integers(1, 3)), draw(st.integers(min_samples, 9))
    classes = draw(st.one_of(st.integers(2, 6), st.sampled_from([50, 1000])))
    scale = draw(st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e4]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    z = scale * (2 * torch.rand(inputs, samples, classes, generator=generator) - 1)
    return z.round() if draw(st.booleans()) else z


@given(logits(), st.floats(0.1, 10))
def test_the_laws_of_probability_and_information(z: Tensor, temperature: float) -> None:
    outcome = predictive(z, temperature)
    p = outcome.probabilities
    assert torch.allclose(p.sum(-1), torch.ones(len(p), dtype=torch.float64), atol=1e-12)
    assert (p >= 0).all()
    assert (outcome.mutual_information >= 0).all()
    assert (outcome.mutual_information <= outcome.entropy).all()
    assert (outcome.entropy <= math.log(z.shape[-1])).all()
    assert (outcome.expected_entropy >= 0).all()
    assert torch.allclose(outcome.entropy, outcome.expected_entropy + outcome.mutual_information, atol=1e-12)
    for field in FIELDS:
        assert torch.isfinite(getattr(outcome, field)).all()


@given(logits())
def test_mutual_information_is_mean_entropy_taken_from_total_entropy(z: Tensor) -> None:
    outcome = predictive(z)
    per_sample = torch.special.entr(outcome.sample_probabilities).sum(-1).mean(-1)
    assert torch.allclose(outcome.expected_entropy, per_sample, atol=1e-9)


@given(logits())
def test_one_sample_has_no_mutual_information(z: Tensor) -> None:
    assert (predictive(z[:, :1]).mutual_information == 0).all()


@given(logits(), st.integers(2, 9))
def test_identical_samples_have_no_mutual_information(z: Tensor, samples: int) -> None:
    assert predictive(z[:, :1].expand(-1, samples, -1)).mutual_information.max() <= 1e-12


@given(logits(), st.integers(0, 2**32))
def test_permutations_change_nothing_else(z: Tensor, seed: int) -> None:
    outcome = predictive(z)
    generator = torch.Generator().manual_seed(seed)
    inputs, samples, classes = (torch.randperm(n, generator=generator) for n in z.shape)
    for field in FIELDS:
        value = getattr(outcome, field)
        assert torch.equal(getattr(predictive(z[inputs]), field), value[inputs])
        assert torch.allclose(getattr(predictive(z[:, samples]), field), value, atol=1e-11)
        expected = value[:, classes] if field == "probabilities" else value
        assert torch.allclose(getattr(predictive(z[..., classes]), field), expected, atol=1e-11)


@given(logits())
def test_a_shift_of_a_samples_logits_changes_nothing(z: Tensor) -> None:
    shift = torch.arange(z.shape[1]).view(1, -1, 1) * 37.0
    one, other = predictive(z.double()), predictive(z.double() + shift)
    for field in FIELDS:
        assert torch.allclose(getattr(one, field), getattr(other, field), atol=1e-9)


@given(logits())
def test_a_batch_is_its_inputs_one_by_one(z: Tensor) -> None:
    together = predictive(z)
    for index, alone in enumerate(map(predictive, z)):
        for field in FIELDS:
            assert torch.allclose(getattr(alone, field), getattr(together, field)[index], atol=1e-12)


@given(logits())
def test_the_temperature_divides_the_logits(z: Tensor) -> None:
    assert torch.equal(predictive(z.double(), 2.5).probabilities, predictive(z.double() / 2.5).probabilities)


@settings(max_examples=25)
@given(st.integers(1, 6), st.integers(2, 6), st.sampled_from([0.01, 1.0, 20.0, 300.0]), st.integers(0, 2**32))
def test_values_agree_with_sixty_digits(samples: int, classes: int, scale: float, seed: int) -> None:
    z = scale * torch.randn(samples, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with mpmath.workdps(60):
        rows = [[mpmath.e ** mpmath.mpf(value) for value in row] for row in z.tolist()]
        p = [[value / mpmath.fsum(row) for value in row] for row in rows]
        mean = [mpmath.fsum(column) / samples for column in zip(*p, strict=True)]
        entropy = -mpmath.fsum(v * mpmath.log(v) for v in mean)
        expected = -mpmath.fsum(v * mpmath.log(v) for row in p for v in row) / samples
        outcome = predictive(z)
        assert outcome.probabilities.tolist() == pytest.approx([float(v) for v in mean], rel=1e-11)
        assert float(outcome.entropy) == pytest.approx(float(entropy), rel=1e-10, abs=1e-14)
        assert float(outcome.mutual_information) == pytest.approx(float(entropy - expected), rel=1e-6, abs=1e-15)


def test_small_mutual_information_keeps_its_digits() -> None:
    """Two samples that differ by d = 1e-6 in one logit: MI = p (1 - p) (d / 2)^2 / 2, lost in a difference."""
    z = torch.tensor([[[1.0, 0.0], [1.0 + 1e-6, 0.0]]], dtype=torch.float64)
    p = 1 / (1 + math.exp(-1))
    assert float(predictive(z).mutual_information) == pytest.approx(p * (1 - p) * (1e-6) ** 2 / 8, rel=1e-3)


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("scheme", ["gaussian", "antithetic"])
def test_standard_errors_are_the_spread_of_repetitions(scheme: Scheme, members: int) -> None:
    generator = torch.Generator().manual_seed(0)
    repetitions, samples = 4000, 66
    epsilon = torch.randn(repetitions, samples, 3, generator=generator, dtype=torch.float64)
    if scheme == "antithetic":
        for member in range(members):
            own = epsilon[:, member::members]  # a view
            own[:, 1::2] = -own[:, 0::2]
    # Members with modes and widths of their own.
    modes = torch.tensor([[1.0, 0.0, -0.5], [-1.0, 2.0, 0.0], [0.0, 0.0, 3.0]])[torch.arange(samples) % members]
    widths = torch.tensor([0.8, 0.2, 1.2])[torch.arange(samples) % members]
    outcome = predictive(modes + widths.unsqueeze(1) * epsilon, scheme=scheme, members=members)
    for field in FIELDS:
        spread = getattr(outcome, field).std(0)
        estimated = getattr(outcome.standard_error, field).square().mean(0).sqrt()
        assert torch.allclose(estimated, spread, rtol=0.08), field


def test_every_member_needs_two_samples_for_an_error() -> None:
    z = torch.randn(1, 6, 3)
    assert torch.isnan(predictive(z[:, :5], members=3).standard_error.entropy).all()
    assert not torch.isnan(predictive(z, members=3).standard_error.entropy).any()
    assert [degrees_of_freedom(count, "sobol", 3) for count in (3, 5, 6, 9, 18)] == [0, 0, 1, 2, 5]
    assert [degrees_of_freedom(count, "antithetic", 3) for count in (6, 12, 24)] == [0, 1, 3]


def test_an_odd_antithetic_draw_is_counted() -> None:
    z = torch.randn(1, 7, 3, generator=torch.Generator().manual_seed(0))
    whole = predictive(z[:, :6], scheme="antithetic").standard_error.entropy
    assert 0.5 * whole < predictive(z, scheme="antithetic").standard_error.entropy < 2 * whole


@pytest.mark.parametrize(("scheme", "samples", "known"), [("gaussian", 1, False), ("gaussian", 2, True),
                                                          ("antithetic", 3, False), ("antithetic", 4, True),
                                                          ("antithetic", 1, False), ("sobol", 2, True)])  # fmt: skip
def test_errors_are_nan_until_there_are_two_independent_units(scheme: Scheme, samples: int, known: bool) -> None:
    error = predictive(torch.randn(2, samples, 3), scheme=scheme).standard_error
    for field in FIELDS:
        assert torch.isnan(getattr(error, field)).any() != known


@pytest.mark.parametrize(
    ("z", "temperature", "message"),
    [
        (torch.zeros(1, 2, 1), 1.0, r"logits need shape \[\.\.\., K >= 1, C >= 2\], got \(1, 2, 1\)"),
        (torch.zeros(1, 0, 2), 1.0, "logits need shape"),
        (torch.zeros(3), 1.0, "logits need shape"),
        (torch.tensor([[0.0, math.nan]]), 1.0, "the logits are not finite"),
        (torch.tensor([[0.0, -math.inf]]), 1.0, "the logits are not finite"),
        (torch.zeros(1, 1, 2), 0.0, "temperature is 0.0; it must be above 0"),
    ],
)
def test_what_has_no_answer_is_refused(z: Tensor, temperature: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        predictive(z, temperature)
