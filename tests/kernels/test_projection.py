"""`subspace_projection` against the formula with explicit weights, row by row, in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import subspace_projection
from tests.watching import LargestTensor

SCALING = 1.7


def _operands(
    rows: int, middle: tuple[int, ...], d_in: int, d_out: int, rank: int, samples: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows * 1000 + rank)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "y": normal(rows, *middle, d_out),
        "x": normal(rows, *middle, d_in),
        "lora_a": normal(rank, d_in),
        "lora_b": normal(d_out, rank),
        "s": normal(samples, rank),
        "sample": torch.randint(samples, (rows,), generator=generator),
    }


def _expected(y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, s: Tensor, sample: Tensor) -> Tensor:
    """The weight of each row's sample, made in full."""
    y, x, lora_a, lora_b, s = (tensor.double() for tensor in (y, x, lora_a, lora_b, s))
    deltas = [SCALING * lora_b @ torch.diag(s[k]) @ lora_a for k in sample]
    return torch.stack([row + x_row @ delta.T for row, x_row, delta in zip(y, x, deltas, strict=True)])


@pytest.mark.parametrize("rank", [1, 5, 8, 40])
@pytest.mark.parametrize("middle", [(), (3,), (2, 4)])
@pytest.mark.parametrize(("rows", "samples"), [(1, 1), (7, 3), (64, 16)])
@pytest.mark.parametrize("inplace", [True, False])
def test_it_is_the_formula(rows: int, samples: int, middle: tuple[int, ...], rank: int, inplace: bool) -> None:
    operands = _operands(rows, middle, 24, 20, rank, samples)
    expected, before = _expected(**operands), operands["y"].clone()
    result = subspace_projection(**operands, scaling=SCALING, inplace=inplace)
    assert torch.allclose(result.double(), expected, rtol=1e-5, atol=2e-5 * rank)
    if inplace:
        assert result is operands["y"]
    else:
        assert torch.equal(operands["y"], before)


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("which", ["y", "x", "s", "lora_a", "lora_b"])
def test_any_stride_is_read_and_written_in_its_place(which: str, inplace: bool) -> None:
    operands = _operands(6, (3,), 24, 20, 8, 4)
    wide = torch.full((*operands[which].shape[:-1], 2 * operands[which].shape[-1]), torch.nan)
    wide[..., ::2] = operands[which]
    operands[which] = wide[..., ::2]
    assert not operands[which].is_contiguous()
    expected = _expected(**operands)
    result = subspace_projection(**operands, scaling=SCALING, inplace=inplace)
    assert torch.allclose(result.double(), expected, atol=1e-4)
    assert wide[..., 1::2].isnan().all(), "nothing was written between the strides"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_half_precision_is_within_its_rounding(dtype: torch.dtype, tolerance: float) -> None:
    operands = _operands(32, (2,), 64, 48, 8, 4, dtype)
    expected = _expected(**operands)
    result = subspace_projection(**operands, scaling=SCALING, inplace=True)
    assert result.dtype == dtype
    assert (result.double() - expected).abs().max() <= 4 * tolerance * expected.abs().max()


def test_gradients_out_of_place_are_those_of_the_formula() -> None:
    operands = {name: t.double() if t.is_floating_point() else t for name, t in _operands(4, (2,), 5, 3, 2, 3).items()}
    names = [name for name in operands if name != "sample"]
    tensors = [operands[name].requires_grad_() for name in names]

    def run(*values: Tensor) -> Tensor:
        given: dict[str, Any] = dict(zip(names, values, strict=True)) | {"sample": operands["sample"]}
        return subspace_projection(**given, scaling=SCALING, inplace=False)

    assert torch.autograd.gradcheck(run, tensors)


def test_in_place_it_makes_nothing_larger_than_the_scaled_subspace() -> None:
    operands = _operands(64, (), 256, 256, 8, 64)
    with LargestTensor() as watch:
        subspace_projection(**operands, scaling=SCALING, inplace=True)
    assert watch.elements == 64 * 8, "u [M, R], and no copy of any weight per sample"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(7, 23)}, "x has 23 columns, lora_a expects 24"),
        ({"lora_b": torch.ones(20, 9)}, "ranks differ: lora_a 8, lora_b 9, s 8"),
        ({"s": torch.ones(3, 7)}, "ranks differ: lora_a 8, lora_b 8, s 7"),
        ({"y": torch.ones(7, 21)}, r"y has shape \(7, 21\), expected \(7, 20\)"),
        ({"sample": torch.zeros(6, dtype=torch.int64)}, r"sample has shape \(6,\), expected one index for each of 7 rows"),
    ],
)
def test_operands_that_do_not_fit_are_named(changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        subspace_projection(**_operands(7, (), 24, 20, 8, 3) | changes, scaling=SCALING, inplace=False)


def test_a_sample_that_is_not_in_the_table_is_an_error() -> None:
    operands = _operands(4, (), 24, 20, 8, 3) | {"sample": torch.tensor([0, 1, 2, 3])}
    with pytest.raises(IndexError, match=r"out of range|out of bounds"):
        subspace_projection(**operands, scaling=SCALING, inplace=True)
