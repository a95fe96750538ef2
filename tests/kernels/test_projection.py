"""`subspace_projection` against the formula with explicit weights, row by row, in float64."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scalabl_kernels import subspace_projection
from scalabl_kernels.reference import WIDEST, subspace_projection_torch
from torch import Tensor

from tests.kernels.formula import SCALING, by_formula, make_operands
from tests.watching import LargestTensor


@pytest.mark.parametrize("rank", [1, 5, 8, 40])
@pytest.mark.parametrize("middle", [(), (3,), (2, 4)])
@pytest.mark.parametrize(("rows", "samples"), [(1, 1), (7, 3), (64, 16)])
@pytest.mark.parametrize("inplace", [True, False])
def test_it_is_the_formula(rows: int, samples: int, middle: tuple[int, ...], rank: int, inplace: bool) -> None:
    operands = make_operands(rows, middle, 24, 20, rank, samples)
    expected, before = by_formula(**operands), operands["y"].clone()
    result = subspace_projection(**operands, scaling=SCALING, inplace=inplace)
    assert torch.allclose(result.double(), expected, rtol=1e-5, atol=2e-5 * rank)
    if inplace:
        assert result is operands["y"]
    else:
        assert torch.equal(operands["y"], before)


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("which", ["y", "x", "s", "lora_a", "lora_b"])
def test_any_stride_is_read_and_written_in_its_place(which: str, inplace: bool) -> None:
    operands = make_operands(6, (3,), 24, 20, 8, 4)
    wide = torch.full((*operands[which].shape[:-1], 2 * operands[which].shape[-1]), torch.nan)
    wide[..., ::2] = operands[which]
    operands[which] = wide[..., ::2]
    assert not operands[which].is_contiguous()
    expected = by_formula(**operands)
    result = subspace_projection(**operands, scaling=SCALING, inplace=inplace)
    assert torch.allclose(result.double(), expected, atol=1e-4)
    assert wide[..., 1::2].isnan().all(), "nothing was written between the strides"


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_half_precision_is_within_its_rounding(dtype: torch.dtype, tolerance: float) -> None:
    operands = make_operands(32, (2,), 64, 48, 8, 4, dtype)
    expected = by_formula(**operands)
    result = subspace_projection(**operands, scaling=SCALING, inplace=True)
    assert result.dtype == dtype
    assert (result.double() - expected).abs().max() <= 4 * tolerance * expected.abs().max()


def test_gradients_out_of_place_are_those_of_the_formula() -> None:
    operands = {name: t.double() if t.is_floating_point() else t for name, t in make_operands(4, (2,), 5, 3, 2, 3).items()}
    names = [name for name in operands if name != "sample"]
    tensors = [operands[name].requires_grad_() for name in names]

    def run(*values: Tensor) -> Tensor:
        given: dict[str, Any] = dict(zip(names, values, strict=True)) | {"sample": operands["sample"]}
        return subspace_projection(**given, scaling=SCALING, inplace=False)

    assert torch.autograd.gradcheck(run, tensors)


def test_in_place_it_makes_nothing_larger_than_the_scaled_subspace() -> None:
    operands = make_operands(64, (), 256, 256, 8, 64)
    with LargestTensor() as watch:
        subspace_projection_torch(**operands, scaling=SCALING, inplace=True)
    assert watch.elements == 64 * 8, "u [M, R], and no copy of any weight per sample"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(7, 23)}, "x has 23 columns, lora_a expects 24"),
        ({"lora_b": torch.ones(20, 9)}, "ranks differ: lora_a 8, lora_b 9, s 8"),
        ({"s": torch.ones(3, 7)}, "ranks differ: lora_a 8, lora_b 8, s 7"),
        ({"y": torch.ones(7, 21)}, r"y has shape \(7, 21\), expected \(7, 20\)"),
        (
            {"sample": torch.zeros(6, dtype=torch.int64)},
            "sample has 6 entries, expected one, or the same number .* each of 7 rows",
        ),
        (
            {
                "lora_a": torch.ones(2, 8, 24),
                "lora_b": torch.ones(2, 20, 8),
                "adapter": torch.zeros(7, dtype=torch.int64),
            },
            r"adapter has shape \(7,\), expected one index for each of 3 rows of s",
        ),
    ],
)
def test_operands_that_do_not_fit_are_named(changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        subspace_projection(**make_operands(7, (), 24, 20, 8, 3) | changes, scaling=SCALING, inplace=False)


def test_a_sample_that_is_not_in_the_table_is_an_error() -> None:
    operands = make_operands(4, (), 24, 20, 8, 3) | {"sample": torch.tensor([0, 1, 2, 3])}
    with pytest.raises(IndexError, match=r"out of range|out of bounds"):
        subspace_projection(**operands, scaling=SCALING, inplace=True)


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("fan_out", [1, 4])
@pytest.mark.parametrize(("adapters", "rank"), [(None, 8), (3, 8), (WIDEST // 8 + 1, 8)])
def test_rows_may_share_an_input_and_have_adapters_of_their_own(
    adapters: int | None, rank: int, fan_out: int, inplace: bool
) -> None:
    operands = make_operands(12, (2,), 24, 20, rank, 40, fan_out=fan_out, adapters=adapters)
    expected = by_formula(**operands)
    result = subspace_projection(**operands, scaling=SCALING, inplace=inplace)
    assert torch.allclose(result.double(), expected, atol=1e-4)


def test_an_adapter_with_large_values_changes_only_its_own_rows() -> None:
    operands = make_operands(6, (), 24, 20, 8, 5, adapters=2)
    operands["lora_a"][0] = 1e30
    expected = by_formula(**operands)
    own = operands["adapter"][operands["sample"]] == 1
    result = subspace_projection(**operands, scaling=SCALING, inplace=True)
    assert torch.allclose(result[own].double(), expected[own], atol=1e-4)


def test_gradients_with_several_adapters_are_those_of_the_formula() -> None:
    made = make_operands(4, (2,), 5, 3, 2, 3, adapters=2)
    operands = {name: t.double() if t.is_floating_point() else t for name, t in made.items()}
    names = [name for name in operands if name not in ("sample", "adapter")]
    whole = {name: operands[name] for name in ("sample", "adapter")}

    def run(*values: Tensor) -> Tensor:
        given: dict[str, Any] = dict(zip(names, values, strict=True)) | whole
        return subspace_projection(**given, scaling=SCALING, inplace=False)

    assert torch.autograd.gradcheck(run, [operands[name].requires_grad_() for name in names])


@pytest.mark.parametrize("inplace", [True, False])
def test_torch_compile_sees_one_operator(inplace: bool) -> None:
    operands = make_operands(6, (3,), 24, 20, 8, 4)
    graphs: list[torch.fx.GraphModule] = []

    def capture(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(functools.partial(subspace_projection, inplace=inplace), backend=capture, fullgraph=True)
    expected = by_formula(**operands)
    result = compiled(**operands, scaling=SCALING)
    assert torch.allclose(result.double(), expected, atol=1e-4)
    (graph,) = graphs
    calls = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert sum("subspace_projection_" in call for call in calls) == 1
    assert not [call for call in calls if "linear" in call or "addmm" in call]


def test_the_operator_passes_torchs_own_checks() -> None:
    operands = make_operands(6, (3,), 24, 20, 8, 4)
    torch.library.opcheck(
        torch.ops.scalabl.subspace_projection_.default,
        (*(operands[name] for name in ("y", "x", "lora_a", "lora_b", "s", "sample")), SCALING, None),
    )
