"""`subspace_projection` as one Triton kernel: shrink, per-sample scale, expand and add, in a single launch.

y[m] += scaling * B (s[sample[m]] * (A x[m])). All posterior samples of an adapter share A and B, and only s differs. So the
grid simply runs over the rows, each row loads its own r scalars, and rows need not be sorted. u = A x stays in registers, so
that no tensor of size M x R or K x weights is ever in device memory. Products are accumulated and added to y in float32, and
rounded once. With several adapters, each block of rows computes those that its rows use. The plain torch form is in
`reference`; `projection` chooses between the two.

Source of the formula: Samplawski et al. 2025 (arXiv 2506.21408), W_k = W0 + scaling * B diag(s_k) A.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from scalabl_kernels.launch import Architecture, blocks_per_program, choose, nearest, padded_rank

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit  # type: ignore[untyped-decorator]  # triton is untyped
def _project(  # type: ignore[no-untyped-def]  # its arguments are Triton's
    y, x_rows, a_rows, b_rows, s, sample, adapter, which, mine, leading, token, ranks, rank_ok, first, last, scaling,
    fan_out, d_in, d_out, y_row, y_token, y_column, x_column, s_row,
    MANY_ADAPTERS: tl.constexpr, RANK: tl.constexpr, PADDED_RANK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Adds one adapter's product to its own rows of y; `mine` are the rows of x that exist."""
    # Shrink: u = A x, [BLOCK_M, PADDED_RANK].
    u = tl.zeros([BLOCK_M, PADDED_RANK], dtype=tl.float32)
    for start in range(0, d_in, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        inner_ok = inner < d_in
        x_tile = tl.load(x_rows + inner[None, :] * x_column, mask=mine[:, None] & inner_ok[None, :], other=0.0)
        a_tile = tl.load(a_rows + inner[:, None], mask=inner_ok[:, None] & rank_ok[None, :], other=0.0)
        if UPCAST:
            x_tile = x_tile.to(tl.float32)
            a_tile = a_tile.to(tl.float32)
        u = tl.dot(x_tile, a_tile, u, input_precision=PRECISION)

    # Each posterior sample of the row: scale, expand, add.
    for k in range(fan_out):
        y_leading = leading * fan_out + k
        chosen = tl.load(sample + y_leading, mask=mine, other=0)
        own = mine
        if MANY_ADAPTERS:
            own = mine & (tl.load(adapter + chosen, mask=mine, other=-1) == which)
        scale = tl.load(s + chosen[:, None] * s_row + ranks[None, :], mask=mine[:, None] & rank_ok[None, :], other=0.0)
        v = u * scale.to(tl.float32)
        if not UPCAST:
            v = v.to(y.dtype.element_ty)
        y_rows = y + y_leading[:, None] * y_row + token[:, None] * y_token
        for block in tl.range(first, last, num_stages=1):
            outer = block * BLOCK_N + tl.arange(0, BLOCK_N)
            outer_ok = outer < d_out
            b_tile = tl.load(
                b_rows + outer[None, :] * RANK + ranks[:, None], mask=rank_ok[:, None] & outer_ok[None, :], other=0.0
            )
            if UPCAST:
                b_tile = b_tile.to(tl.float32)
            delta = tl.dot(v, b_tile, input_precision=PRECISION)
            y_tile = y_rows + outer[None, :] * y_column
            y_ok = own[:, None] & outer_ok[None, :]
            total = tl.load(y_tile, mask=y_ok, other=0.0).to(tl.float32) + scaling * delta
            tl.store(y_tile, total.to(y.dtype.element_ty), mask=y_ok)


# Without this, Triton would compile another kernel for some values of these numbers, which change from batch to batch.
@triton.jit(do_not_specialize=["num_rows", "num_adapters", "tokens", "fan_out", "blocks"])  # type: ignore[untyped-decorator]  # as above
def subspace_projection_kernel(  # type: ignore[no-untyped-def]  # its arguments are Triton's
    y, x, lora_a, lora_b, s, sample, adapter,
    scaling,
    num_rows,  # rows of x, leading index and tokens together
    num_adapters,
    tokens,  # rows of x that share a leading index
    fan_out,  # rows of y for each row of x
    d_in, d_out,
    blocks,  # blocks of y's columns that one program computes
    y_row, y_token, y_column, x_row, x_token, x_column, s_row,  # strides in elements
    RANK: tl.constexpr,
    PADDED_RANK: tl.constexpr,
    MANY_ADAPTERS: tl.constexpr,  # whether `adapter` says which adapter each row of s belongs to
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,  # for Triton's interpreter, which would multiply the bit patterns of bfloat16
):  # fmt: skip
    """Grid: (blocks of x's rows, blocks of y's columns). A row is (leading index, token)."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    first = tl.program_id(1) * blocks
    last = tl.minimum(first + blocks, tl.cdiv(d_out, BLOCK_N))
    ranks = tl.arange(0, PADDED_RANK)
    rank_ok = ranks < RANK
    row_ok = rows < num_rows
    leading = (rows // tokens).to(tl.int64)  # 64-bit offsets: rows x columns passes 2**31
    token = (rows % tokens).to(tl.int64)
    x_rows = x + leading[:, None] * x_row + token[:, None] * x_token
    a_rows = lora_a + ranks[None, :] * d_in
    if MANY_ADAPTERS:
        # Rows of different adapters may be mixed: each adapter that has rows in this block is applied to its own rows.
        for which in range(num_adapters):
            present = 0
            for k in range(fan_out):
                chosen = tl.load(sample + leading * fan_out + k, mask=row_ok, other=0)
                present += tl.sum((tl.load(adapter + chosen, mask=row_ok, other=-1) == which).to(tl.int32), axis=0)
            if present > 0:
                _project(
                    y, x_rows, a_rows + which * RANK * d_in, lora_b + which * d_out * RANK, s, sample, adapter, which,
                    row_ok, leading, token, ranks, rank_ok, first, last, scaling, fan_out, d_in, d_out,
                    y_row, y_token, y_column, x_column, s_row,
                    True, RANK, PADDED_RANK, BLOCK_M, BLOCK_K, BLOCK_N, PRECISION, UPCAST,
                )  # fmt: skip
    else:
        _project(
            y, x_rows, a_rows, lora_b, s, sample, adapter, 0, row_ok, leading, token, ranks, rank_ok, first, last, scaling,
            fan_out, d_in, d_out, y_row, y_token, y_column, x_column, s_row,
            False, RANK, PADDED_RANK, BLOCK_M, BLOCK_K, BLOCK_N, PRECISION, UPCAST,
        )  # fmt: skip


def _as_rows(tensor: Tensor) -> Tensor | None:
    """[M, ..., d] as a view [M, tokens, d], or None if the middle dimensions cannot be merged into one stride."""
    if tensor.dim() == 2:
        return tensor.unsqueeze(1)
    try:
        return tensor.view(tensor.shape[0], -1, tensor.shape[-1])
    except RuntimeError:
        return None


def architecture_of(device: torch.device) -> Architecture:
    """The entry of the launch table for a device."""
    if device.type != "cuda":  # the interpreter
        return nearest("sm_80")
    if torch.version.hip is not None:
        return nearest(torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0])
    major, minor = torch.cuda.get_device_capability(device)
    return nearest(f"sm_{major}{minor}")


def subspace_projection_fused(
    y: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    s: Tensor,
    sample: Tensor,
    scaling: float,
    adapter: Tensor | None,
) -> None:
    """Launch the kernel, which adds into y. Shapes as in `projection`; lora_a is [L, R, d_in] and lora_b [L, d_out, R]."""
    if y.numel() == 0:
        return
    into, rows = _as_rows(y), _as_rows(x)
    if into is None:  # y cannot be viewed as rows: work on a copy
        copy = y.contiguous()
        subspace_projection_fused(copy, x, lora_a, lora_b, s, sample, scaling, adapter)
        y.copy_(copy)
        return
    if rows is None:
        rows = x.contiguous().view(x.shape[0], -1, x.shape[-1])
    # These are small: copying is cheaper than strided reads.
    lora_a, lora_b, sample = lora_a.contiguous(), lora_b.contiguous(), sample.contiguous()
    s = s if s.stride(1) == 1 else s.contiguous()
    num_adapters, rank, d_in = lora_a.shape
    groups, tokens, d_out = rows.shape[0], rows.shape[1], into.shape[2]
    num_rows = groups * tokens
    architecture = architecture_of(y.device)
    shape = choose(architecture, num_rows, rank, y.element_size(), num_adapters)
    blocks = blocks_per_program(architecture, shape, num_rows, d_out)
    launch: dict[str, Any] = {} if INTERPRETED else {"num_warps": shape.num_warps, "num_stages": shape.num_stages}
    grid = (triton.cdiv(num_rows, shape.block_m), triton.cdiv(d_out, blocks * shape.block_n))
    subspace_projection_kernel[grid](
        into,
        rows,
        lora_a,
        lora_b,
        s,
        sample,
        sample if adapter is None else adapter.contiguous(),
        scaling,
        num_rows,
        num_adapters,
        tokens,
        into.shape[0] // groups,
        d_in,
        d_out,
        blocks,
        *into.stride(),
        *rows.stride(),
        s.stride(0),
        RANK=rank,
        PADDED_RANK=padded_rank(rank),
        MANY_ADAPTERS=adapter is not None,
        BLOCK_M=shape.block_m,
        BLOCK_K=shape.block_k,
        BLOCK_N=shape.block_n,
        PRECISION=architecture.fp32,
        UPCAST=INTERPRETED,
        **launch,
    )
