"""Laplace's approximation against other ways to the same numbers: products, grids, inverses, simulations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from scalabl.uncertainty.absent_choices import ABSENT
from scalabl.uncertainty.laplace import PRECISIONS, Curvature, prior_scale, softmax_root


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _fisher(logits: Tensor) -> Tensor:
    p = torch.softmax(logits.double(), -1)
    return torch.diag(p) - torch.outer(p, p)


def _signs(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@given(st.lists(st.floats(-40, 40), min_size=2, max_size=12))
def test_the_root_of_all_columns_is_exact(logits: list[float]) -> None:
    z = torch.tensor(logits, dtype=torch.float64)
    root = softmax_root(z, _signs(), exact=0)
    assert len(root) < len(z)
    assert torch.allclose(root.T @ root, _fisher(z), atol=1e-14)


def test_the_root_with_random_signs_has_the_right_expectation() -> None:
    z, signs = 2 * _random(8), _signs()
    roots = [softmax_root(z, signs, exact=0.05) for _ in range(4000)]
    assert {len(root) for root in roots} == {3}
    mean = torch.stack([root.T @ root for root in roots]).mean(0)
    assert (mean - _fisher(z)).abs().max() < 2e-3
    assert (roots[0].T @ roots[0] - _fisher(z)).abs().max() > 4e-3  # a single one differs, so the test can fail


def test_a_row_of_which_the_model_is_sure_has_one_vector_or_none() -> None:
    z = torch.zeros(150)
    z[7] = 12.0
    assert len(softmax_root(z, _signs())) == 1
    z[7] = 40.0
    assert len(softmax_root(z, _signs())) == 0


def test_choices_that_an_input_does_not_have_take_no_part() -> None:
    z = torch.cat([_random(3), torch.full((2,), ABSENT, dtype=torch.float64)])
    root = softmax_root(z, _signs(), exact=0)
    assert not root[:, 3:].any()
    assert torch.allclose(root.T @ root, _fisher(z), atol=1e-14)


SCALE = torch.tensor([0.5, 2.0, 1.0, 3.0, 0.1, 1.0], dtype=torch.float64)


def _curvature(members: int = 1, size: int = 6) -> tuple[Tensor, Curvature]:
    half = _random(members, size, size, seed=1) * torch.logspace(-2, 1, size, dtype=torch.float64)
    matrix = half.mT @ half
    return matrix, Curvature.of(matrix, SCALE.expand(members, -1))


@pytest.mark.parametrize("members", [1, 3])
def test_the_factor_is_a_root_of_the_inverse(members: int) -> None:
    matrix, curvature = _curvature(members)
    factor = curvature.factor(0.3)
    inverse = torch.linalg.inv(matrix + 0.3 * torch.diag(SCALE**-2))
    assert torch.allclose(factor @ factor.mT, inverse, rtol=1e-9)
    assert not factor.triu(1).any()
    assert bool((factor.diagonal(dim1=1, dim2=2) > 0).all())


def test_the_diagonal_alone_gives_independent_scalars() -> None:
    matrix, _ = _curvature()
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    expected = (diagonal + 0.3 / SCALE.square()).rsqrt()
    assert torch.allclose(Curvature.of(diagonal, SCALE.unsqueeze(0)).factor(0.3), expected)


def test_the_evidence_of_a_linear_model_is_the_density_of_its_data() -> None:
    """y = X s + noise of variance 1: there Laplace's approximation is exact, and y ~ N(0, I + X X^T / precision)."""
    design, precision = _random(20, 4), 0.7
    y = design @ _random(4, seed=3) + _random(20, seed=4)
    matrix = design.T @ design
    mode = torch.linalg.solve(matrix + precision * torch.eye(4, dtype=torch.float64), design.T @ y)
    density = torch.distributions.MultivariateNormal
    likelihood = density(design @ mode, torch.eye(20, dtype=torch.float64)).log_prob(y)
    whole = density(torch.zeros(20, dtype=torch.float64), torch.eye(20, dtype=torch.float64) + design @ design.T / precision)
    found = Curvature.of(matrix.unsqueeze(0), torch.ones(1, 4)).log_evidence(precision, mode.unsqueeze(0), float(likelihood))
    assert found == pytest.approx(float(whole.log_prob(y)), rel=1e-9)


@pytest.mark.parametrize("members", [1, 2])
def test_the_likeliest_precision_is_that_of_a_grid(members: int) -> None:
    _, curvature = _curvature(members)
    mean = _random(members, 6, seed=5)
    grid = np.geomspace(1e-3, 1e3, 4001)
    best = max(grid, key=lambda precision: curvature.log_evidence(float(precision), mean, 0.0))
    assert curvature.likeliest_precision(mean) == pytest.approx(best, rel=2e-3)


def test_a_precision_without_a_best_value_ends_at_a_bound() -> None:
    nothing = Curvature.of(torch.zeros(1, 3, 3), torch.ones(1, 3))
    assert nothing.likeliest_precision(torch.ones(1, 3)) == PRECISIONS[0]
    _, curvature = _curvature()
    assert curvature.likeliest_precision(torch.full((1, 6), 1e-9)) == PRECISIONS[1]


def test_the_scalars_that_the_rows_determine_are_counted() -> None:
    curvature = Curvature(torch.ones(1, 4), torch.tensor([[1e9, 1e9, 1.0, 0.0]], dtype=torch.float64))
    assert curvature.determined(1.0) == pytest.approx(2.5)
    assert math.isclose(curvature.determined(1e-9), 3.0, rel_tol=1e-6)


def test_the_units_do_not_matter_to_a_relative_prior() -> None:
    """If a scalar is measured in other units, with B to match, its posterior is the same in these units."""
    matrix, _ = _curvature()
    mean, units = _random(1, 6, seed=5), torch.tensor([1.0, 10.0, 0.1, 5.0, 1.0, 2.0], dtype=torch.float64)
    factors, precisions = [], []
    for unit in (torch.ones(6, dtype=torch.float64), units):
        curvature = Curvature.of(matrix * torch.outer(unit, unit), prior_scale(mean / unit, 1))
        precisions.append(curvature.likeliest_precision(mean / unit))
        factors.append(unit.unsqueeze(-1) * curvature.factor(precisions[-1]))
    assert precisions[0] == pytest.approx(precisions[1], rel=1e-6)
    assert torch.allclose(*factors, rtol=1e-6)


def test_a_scalar_near_0_has_the_scale_of_its_layer() -> None:
    mean = torch.tensor([[3.0, -4.0, 0.0, 1e-9, 0.0, 0.0, 0.0, 0.0]])
    scale = prior_scale(mean, 4)
    assert torch.allclose(scale[0, :4], torch.tensor([3.0, 4.0, 0.025, 0.025], dtype=torch.float64))
    assert bool((scale > 0).all())
