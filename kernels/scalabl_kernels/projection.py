"""The dispatcher: checks the operands of `subspace_projection` and runs the form for their device.

The forms themselves are in `fused` (Triton) and `reference` (plain torch).
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from scalabl_kernels.reference import subspace_projection_torch

FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# One torch operator, so that torch.compile sees one node and not a Triton launch.
OPERATOR = "scalabl::subspace_projection_"
torch.library.define(
    OPERATOR,
    "(Tensor(a!) y, Tensor x, Tensor lora_a, Tensor lora_b, Tensor s, Tensor sample, float scaling, Tensor? adapter) -> ()",
)


def _plain(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, s: Tensor, sample: Tensor, scaling: float, adapter: Tensor | None
) -> None:
    subspace_projection_torch(y, x, a, b, s, sample, scaling, adapter, inplace=True)


def _fused(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, s: Tensor, sample: Tensor, scaling: float, adapter: Tensor | None
) -> None:
    from scalabl_kernels.fused import subspace_projection_fused  # needs triton, which only some platforms have
    from scalabl_kernels.launch import largest_rank

    num_adapters = 1 if adapter is None else a.shape[0]
    if y.dtype not in FUSED_DTYPES or a.shape[-2] > largest_rank(y.element_size(), num_adapters):
        _plain(y, x, a, b, s, sample, scaling, adapter)
        return
    if adapter is None:
        a, b = a.unsqueeze(0), b.unsqueeze(0)
    subspace_projection_fused(y, x, a, b, s, sample, scaling, adapter)


# For tests: Triton's interpreter, and checkers that replace a GPU, can run the kernel on CPU tensors, slowly.
FUSED_ON_CPU = "1" in (os.environ.get("TRITON_INTERPRET"), os.environ.get("SCALABL_FUSED_ON_CPU"))
torch.library.impl(OPERATOR, "cpu", _fused if FUSED_ON_CPU else _plain)
torch.library.impl(OPERATOR, "cuda", _fused)  # ROCm's devices have this name as well
torch.library.impl(OPERATOR, ("mps", "xpu"), _plain)
torch.library.register_fake(OPERATOR, lambda *operands: None)


def runs_fused(device: torch.device) -> bool:
    """Whether `subspace_projection` runs the Triton kernel on a device, rather than plain torch."""
    return device.type == "cuda" or FUSED_ON_CPU


def subspace_projection(
    y: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    s: Tensor,
    sample: Tensor,
    scaling: float,
    adapter: Tensor | None = None,
    *,
    inplace: bool,
) -> Tensor:
    """y[m] + scaling * B (s[sample[m]] * (A x[m // F])) for every row m, without a copy of any weight per sample.

    With several adapters, A and B are those of adapter[sample[m]].

    Args:
        y: [M, ..., d_out], the base layer's output.
        x: [M, ..., d_in], the base layer's input, of the same dtype and middle dimensions as y; or [M / F, ..., d_in] where
            F consecutive rows of y have the same input, which is then projected once.
        lora_a: [R, d_in], the shared down-projection A; [L, R, d_in] for L adapters.
        lora_b: [d_out, R], the shared up-projection B; [L, d_out, R] for L adapters.
        s: [S, R], the table of posterior samples of the R subspace scalars.
        sample: [M] int64, the row of `s` that each row of y uses.
        scaling: alpha / R.
        adapter: [S] int64, the adapter that each row of `s` belongs to; None for one adapter.
        inplace: add into y and return it; otherwise y does not change.

    If any operand requires a gradient, the operation runs in plain torch.

    Returns:
        [M, ..., d_out]: y itself when `inplace`, a new tensor otherwise.

    Raises:
        ValueError: the shapes do not match; the message names the operand.

    Source: Samplawski et al. 2025 (arXiv 2506.21408), W_k = W0 + scaling * B diag(s_k) A.
    """
    expected_dims = 2 if adapter is None else 3
    if lora_a.dim() != expected_dims or lora_b.dim() != expected_dims:
        raise ValueError(
            f"lora_a and lora_b have {lora_a.dim()} and {lora_b.dim()} dimensions, expected {expected_dims} "
            f"{'without' if adapter is None else 'with'} adapter indices"
        )
    rank, d_in = lora_a.shape[-2:]
    d_out = lora_b.shape[-2]
    if x.shape[-1] != d_in:
        raise ValueError(f"x has {x.shape[-1]} columns, lora_a expects {d_in}")
    if lora_b.shape[-1] != rank or s.shape[-1] != rank:
        raise ValueError(f"ranks differ: lora_a {rank}, lora_b {lora_b.shape[-1]}, s {s.shape[-1]}")
    rows = sample.shape[0]
    if x.shape[0] == 0 or rows % x.shape[0]:
        raise ValueError(
            f"sample has {rows} entries, expected one, or the same number of them, for each of {x.shape[0]} rows"
        )
    if y.shape != (rows, *x.shape[1:-1], d_out):
        raise ValueError(f"y has shape {tuple(y.shape)}, expected {(rows, *x.shape[1:-1], d_out)}")
    if adapter is not None and adapter.shape != s.shape[:1]:
        raise ValueError(f"adapter has shape {tuple(adapter.shape)}, expected one index for each of {s.shape[0]} rows of s")
    floating = (y, x, lora_a, lora_b, s)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in floating):
        return subspace_projection_torch(y, x, lora_a, lora_b, s, sample, scaling, adapter, inplace=inplace)
    into = y if inplace else y.clone()
    if torch.compiler.is_compiling():
        torch.ops.scalabl.subspace_projection_(into, x, lora_a, lora_b, s, sample, scaling, adapter)
    else:  # call it directly: the operator's dispatch costs more than a small projection
        form = _fused if runs_fused(y.device) else _plain
        form(into, x, lora_a, lora_b, s, sample, scaling, adapter)
    return into
