"""`subspace_projection` in plain torch: the reference for every other form, and the form that runs on a CPU."""

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
    *,
    inplace: bool,
) -> Tensor:
    """Shapes as in `kernels.subspace_projection`. Differentiable in x, A, B and s when not `inplace`."""
    per_row = s[sample].to(x.dtype)  # [M, R]
    per_row = per_row.view(per_row.shape[0], *([1] * (x.dim() - 2)), per_row.shape[1])
    u = torch.nn.functional.linear(x, lora_a) * per_row  # [M, ..., R]
    if inplace and y.is_contiguous():
        # One pass over y: the product is accumulated into it, never held beside it.
        y.view(-1, y.shape[-1]).addmm_(u.flatten(0, -2), lora_b.t(), alpha=scaling)
        return y
    delta = torch.nn.functional.linear(u, lora_b)
    return y.add_(delta, alpha=scaling) if inplace else y.add(delta, alpha=scaling)
