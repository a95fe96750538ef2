"""The Triton kernel against the formula in float64, on a GPU where there is one and in Triton's interpreter elsewhere.

Every operand is a window into poisoned memory, so that a read outside it shows in the result, and a write outside y in what
is around it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from scalabl_kernels import projection as dispatcher
from scalabl_kernels import subspace_projection
from scalabl_kernels.launch import FEW_ROWS, MAX_RANK, WIDE_RANK
from torch import Tensor

from tests.kernels.formula import SCALING, by_formula, make_operands

fused = pytest.importorskip("scalabl_kernels.fused", reason="triton is not installed; it is for Linux")

pytestmark = [
    pytest.mark.fused,
    pytest.mark.skipif(
        not (torch.cuda.is_available() or dispatcher.FUSED_ON_CPU), reason="needs a GPU, or TRITON_INTERPRET=1"
    ),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Largest error over largest value. float32 products are exact in the interpreter and three TF32 products on NVIDIA GPUs.
# bfloat16: half a unit in the last place of the sum, and one rounding of u * s before it.
TOLERANCES = {torch.float32: 1e-6 if fused.INTERPRETED else 2e-6, torch.float16: 2e-3, torch.bfloat16: 2**-7}
ROWS, WIDTHS, RANKS = (1, 7, 64, 77, 300), (64, 96, 200, 576), (1, 5, 8, 16, 24, 64)


POISON_Y = 7.25  # around y stands a number: a sum written over NaN would be NaN still


def window(tensor: Tensor, poison: float, step: int = 1) -> tuple[Tensor, Tensor]:
    """(a window with the tensor's values, the memory it lies in): poison around it, and between columns if step > 1."""
    *leading, columns = tensor.shape
    width = columns * step + 8  # and after each row
    rows = tensor.numel() // columns
    margin = 70 * width
    memory = torch.full((margin + rows * width + margin,), poison, dtype=tensor.dtype, device=DEVICE)
    inside = memory[margin : margin + rows * width].view(*leading, width)[..., : columns * step : step]
    inside.copy_(tensor)
    return inside, memory


def on_device(operands: dict[str, Tensor], step: int = 1) -> tuple[dict[str, Tensor], Tensor]:
    """Every operand as a window into poisoned memory, and the memory around y."""
    placed = {name: tensor.to(DEVICE) for name, tensor in operands.items()}
    placed["y"], around = window(operands["y"], POISON_Y, step)
    for name in ("x", "s"):
        placed[name], _ = window(operands[name], torch.nan, step)
    # Read as they are when contiguous, so the poison stands before and after. An index read too far leads to NaN in s.
    beyond = operands["s"].shape[0]
    for name, poison in (("lora_a", torch.nan), ("lora_b", torch.nan), ("sample", beyond), ("adapter", beyond)):
        if name not in operands:
            continue
        tensor = operands[name]
        margin = torch.full((70 * tensor.shape[-1],), poison, dtype=tensor.dtype)
        memory = torch.cat([margin, tensor.flatten(), margin]).to(DEVICE)
        placed[name] = memory[len(margin) : len(margin) + tensor.numel()].view(tensor.shape)
    return placed, around


def worst_error(result: Tensor, expected: Tensor) -> float:
    """Largest error over largest value; NaN anywhere is infinite."""
    error = (result.double().cpu() - expected).abs().nan_to_num(nan=torch.inf).max() / expected.abs().max()
    return float(error)


def check(operands: dict[str, Tensor], *, inplace: bool, step: int = 1) -> None:
    expected = by_formula(**operands)
    placed, around = on_device(operands, step)
    untouched = around.clone()
    before = placed["y"].clone()
    result = subspace_projection(**placed, scaling=SCALING, inplace=inplace)
    assert worst_error(result, expected) <= TOLERANCES[operands["y"].dtype]
    assert (result is placed["y"]) == inplace
    if inplace:
        placed["y"].copy_(before)
    assert torch.equal(around, untouched), "wrote where it should not"


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("rows", ROWS)
def test_it_is_the_formula(rows: int, width: int, rank: int, dtype: torch.dtype) -> None:
    d_in = WIDTHS[(WIDTHS.index(width) + rank) % len(WIDTHS)]  # every pair of widths over the ranks
    check(make_operands(rows, (), d_in, width, rank, 5, dtype), inplace=rows % 2 == 0)


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_any_stride_is_read_and_written_in_its_place(dtype: torch.dtype, inplace: bool) -> None:
    check(make_operands(26, (3,), 96, 200, 8, 7, dtype), inplace=inplace, step=2)


@pytest.mark.parametrize("middle", [(3,), (2, 5)])
def test_rows_of_several_tokens_take_their_leading_rows_sample(middle: tuple[int, ...]) -> None:
    check(make_operands(13, middle, 64, 96, 8, 6), inplace=True)


def test_middle_dimensions_without_one_stride_are_copied() -> None:
    operands = make_operands(4, (6, 5), 64, 96, 8, 6)
    expected = by_formula(**operands)
    for name in ("x", "y"):
        operands[name] = operands[name].to(DEVICE).transpose(1, 2).contiguous().transpose(1, 2)
    placed = {name: tensor.to(DEVICE) for name, tensor in operands.items()}
    result = subspace_projection(**placed, scaling=SCALING, inplace=True)
    assert result is placed["y"]
    assert worst_error(result, expected) <= TOLERANCES[torch.float32]


@pytest.mark.parametrize("middle", [(), (4,)])
@pytest.mark.parametrize("fan_out", [3, 16])
def test_rows_that_share_an_input_bring_it_once(fan_out: int, middle: tuple[int, ...]) -> None:
    check(make_operands(5 * fan_out, middle, 96, 200, 8, fan_out, fan_out=fan_out), inplace=True)


@pytest.mark.parametrize("fan_out", [1, 4])
@pytest.mark.parametrize("rows", [8, 300])
def test_each_row_has_its_adapter(rows: int, fan_out: int) -> None:
    check(make_operands(rows, (2,), 96, 64, 5, 7, fan_out=fan_out, adapters=3), inplace=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [100, MAX_RANK])
@pytest.mark.parametrize("rows", [7, FEW_ROWS + 1])
def test_wide_ranks(rows: int, rank: int, dtype: torch.dtype) -> None:
    check(make_operands(rows, (), 200, 96, rank, 3, dtype), inplace=True)


@pytest.mark.parametrize(
    ("rank", "dtype", "adapters"),
    [(MAX_RANK + 1, torch.float32, None), (8, torch.float64, None), (WIDE_RANK + 1, torch.float32, 2)],
    ids=str,
)
def test_what_the_kernel_is_not_made_for_runs_in_plain_torch(
    rank: int, dtype: torch.dtype, adapters: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "subspace_projection_kernel", None)
    operands = make_operands(7, (), 96, 64, rank, 3, dtype, adapters=adapters)
    expected = by_formula(**operands)
    placed = {name: tensor.to(DEVICE) for name, tensor in operands.items()}
    assert worst_error(subspace_projection(**placed, scaling=SCALING, inplace=True), expected) <= 1e-6


def test_gradients_come_from_the_plain_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "subspace_projection_kernel", None)
    placed = {name: tensor.to(DEVICE) for name, tensor in make_operands(4, (2,), 96, 64, 8, 3).items()}
    placed["lora_b"].requires_grad_()
    subspace_projection(**placed, scaling=SCALING, inplace=False).sum().backward()
    assert placed["lora_b"].grad is not None


def test_no_rows_are_no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "subspace_projection_kernel", None)
    placed = {name: tensor.to(DEVICE) for name, tensor in make_operands(4, (0,), 96, 64, 8, 3).items()}
    assert subspace_projection(**placed, scaling=SCALING, inplace=True).shape == (4, 0, 64)


# What to break, and what the broken kernel must be caught at.
FAULTS = {
    "no rank mask on A": ("mask=inner_ok[:, None] & rank_ok[None, :]", "mask=inner_ok[:, None]"),
    "no rank mask on s": ("mask=mine[:, None] & rank_ok[None, :]", "mask=mine[:, None]"),
    "no column mask on x": ("mask=mine[:, None] & inner_ok[None, :]", "mask=mine[:, None]"),
    "rows of every adapter": ("own = mine & (tl.load(adapter + chosen, mask=mine, other=-1) == which)", "own = mine"),
    "the first adapter's A for all": ("a_rows + which * RANK * d_in", "a_rows"),
    "the first adapter's B for all": ("lora_b + which * d_out * RANK", "lora_b"),
    "only the first sample's adapter": ("present += tl.sum(", "present += (k == 0) * tl.sum("),
    "no column mask on B and y": ("outer_ok = outer < d_out", "outer_ok = outer >= 0"),
    "no row mask": ("row_ok = rows < num_rows", "row_ok = rows >= 0"),
    "the row's number for its sample": (
        "chosen = tl.load(sample + y_leading, mask=mine, other=0)",
        "chosen = y_leading % 5",
    ),
    "the input's sample for all of its rows": ("tl.load(sample + y_leading,", "tl.load(sample + leading,"),
    "tokens where rows belong": ("leading = (rows // tokens)", "leading = (rows % tokens)"),
    "the scaling is lost": ("scaling * delta", "delta"),
    "y is overwritten": ("tl.load(y_tile, mask=y_ok, other=0.0).to(tl.float32) + ", ""),
    "the last block of columns is left out": ("tl.cdiv(d_out, BLOCK_N))", "d_out // BLOCK_N)"),
}


@pytest.fixture
def broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], ModuleType]:
    """Makes a copy of the kernel's module with one fault and has the dispatcher use it."""

    def make(right: str, wrong: str) -> ModuleType:
        assert fused.__file__ is not None
        source = Path(fused.__file__).read_text(encoding="utf-8")
        assert right in source, "the kernel changed; plant the fault anew"
        path = tmp_path / "broken_kernel.py"
        path.write_text(source.replace(right, wrong), encoding="utf-8")
        spec = importlib.util.spec_from_file_location("broken_kernel", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "broken_kernel", module)  # Triton looks a kernel's module up by name
        spec.loader.exec_module(module)
        monkeypatch.setitem(sys.modules, "scalabl_kernels.fused", module)
        return module

    return make


def _exercise() -> None:
    kinds: list[dict[str, Any]] = [{}, {"fan_out": 4}, {"fan_out": 4, "adapters": 3}, {"fan_out": 20, "adapters": 3}]
    for kind in kinds:
        # Few rows with a ragged last tile in every direction, and x narrower than y.
        check(make_operands(20, (2,), 72, 200, 5, 5, **kind), inplace=True)


def test_the_exercise_of_the_planted_faults_passes_without_one() -> None:
    _exercise()


@pytest.mark.skipif(DEVICE == "cuda", reason="reads and writes outside of memory end a GPU's context")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(fault: str, broken: Callable[[str, str], ModuleType]) -> None:
    broken(*FAULTS[fault])
    with pytest.raises(AssertionError, match=r"worst_error|wrote where it should not"):
        _exercise()


# Faults whose values can be right: only a checker of memory sees them.
MEMORY_FAULTS = {
    "no column mask on y": ("y_ok = own[:, None] & outer_ok[None, :]", "y_ok = own[:, None]"),
    "no row mask": ("row_ok = rows < num_rows", "row_ok = rows >= 0"),
    "programs along the columns repeat the first": ("first = tl.program_id(1) * blocks", "first = tl.program_id(1) * 0"),
}


@pytest.mark.skipif("ttsem" not in sys.modules, reason="needs the checker: `make check-kernel`")
@pytest.mark.parametrize("fault", MEMORY_FAULTS)
def test_the_checker_catches_a_planted_fault(fault: str, broken: Callable[[str, str], ModuleType]) -> None:
    broken(*MEMORY_FAULTS[fault])
    operands = {name: tensor.to(DEVICE) for name, tensor in make_operands(20, (), 72, 200, 5, 5).items()}
    with pytest.raises(Exception, match=r"past the end|program instances"):
        subspace_projection(**operands, scaling=SCALING, inplace=True)


def test_the_dispatcher_uses_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher, "subspace_projection_torch", None)
    check(make_operands(4, (), 64, 64, 8, 3), inplace=True)
