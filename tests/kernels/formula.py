"""Operands for `subspace_projection`, and the formula with the explicit weight of every row, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

SCALING = 1.7


def make_operands(
    rows: int,
    middle: tuple[int, ...],
    d_in: int,
    d_out: int,
    rank: int,
    samples: int,
    dtype: torch.dtype = torch.float32,
    *,
    fan_out: int = 1,
    adapters: int | None = None,
) -> dict[str, Tensor]:
    """Random operands of unit size; `rows` are y's, `fan_out` of them for each row of x."""
    generator = torch.Generator().manual_seed(rows * 1000 + rank)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    stack = () if adapters is None else (adapters,)
    made = {
        "y": normal(rows, *middle, d_out).to(dtype),
        "x": normal(rows // fan_out, *middle, d_in).to(dtype),
        "lora_a": (normal(*stack, rank, d_in) / d_in**0.5).to(dtype),
        "lora_b": normal(*stack, d_out, rank).to(dtype),
        "s": normal(samples, rank),
        "sample": torch.randint(samples, (rows,), generator=generator),
    }
    if adapters is not None:
        made["adapter"] = torch.arange(samples) % adapters
    return made


def by_formula(
    y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, s: Tensor, sample: Tensor, adapter: Tensor | None = None
) -> Tensor:
    """The weight of each row's sample and adapter, made in full."""
    y, x, lora_a, lora_b, s = (tensor.double() for tensor in (y, x, lora_a, lora_b, s))
    fan_out = y.shape[0] // x.shape[0]
    result = y.clone()
    for row, k in enumerate(sample.tolist()):
        of = row // fan_out
        a, b = (lora_a, lora_b) if adapter is None else (lora_a[adapter[k]], lora_b[adapter[k]])
        result[row] += x[of] @ (SCALING * b @ torch.diag(s[k]) @ a).T
    return result
