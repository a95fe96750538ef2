"""`subspace_projection` in plain torch: the reference for the Triton kernel (`fused`), and the form that runs on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor


def subspace_projection_torch(
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
    """Shapes as in `projection.subspace_projection`. Differentiable in y, x, A, B and s if not `inplace`."""
    if adapter is None:
        return _one_adapter(y, x, lora_a, lora_b, s, sample, scaling, inplace=inplace)
    fan_out = y.shape[0] // x.shape[0]
    result = y if inplace else y.clone()
    for which in range(lora_a.shape[0]):
        mine = (adapter == which).nonzero().squeeze(1)
        rows = (mine.unsqueeze(1) * fan_out + torch.arange(fan_out, device=y.device)).flatten()
        part = _one_adapter(y[rows], x[mine], lora_a[which], lora_b[which], s, sample[rows], scaling, inplace=inplace)
        result = result.index_copy_(0, rows, part) if inplace else result.index_copy(0, rows, part)
    return result


def _one_adapter(
    y: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, s: Tensor, sample: Tensor, scaling: float, *, inplace: bool
) -> Tensor:
    per_row = s.index_select(0, sample).to(x.dtype)  # [M, R]
    if x.dim() > 2:
        per_row = per_row.view(per_row.shape[0], *([1] * (x.dim() - 2)), per_row.shape[1])
    u = torch.nn.functional.linear(x, lora_a)  # [M / F, ..., R]
    if y.shape[0] != x.shape[0]:
        u = u.repeat_interleave(y.shape[0] // x.shape[0], dim=0)
    u = u * per_row  # [M, ..., R]
    if inplace and y.is_contiguous():
        # The product is accumulated directly into y, without a temporary tensor of its size.
        flat = y if y.dim() == 2 else y.view(-1, y.shape[-1])
        flat.addmm_(u if u.dim() == 2 else u.flatten(0, -2), lora_b.t(), alpha=scaling)
        return y
    delta = torch.nn.functional.linear(u, lora_b)
    return y.add_(delta, alpha=scaling) if inplace else y.add(delta, alpha=scaling)
