"""`subspace_projection` in plain torch: the reference for the Triton kernel (`fused`), and the form that runs on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

WIDEST = 128  # columns of A x of all adapters together, up to which one product is cheaper than sorting rows by adapter


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
    if lora_a.shape[0] * lora_a.shape[1] <= WIDEST:
        return _side_by_side(y, x, lora_a, lora_b, s, sample, scaling, adapter, inplace=inplace)
    return _one_by_one(y, x, lora_a, lora_b, s, sample, scaling, adapter, inplace=inplace)


def _side_by_side(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, s: Tensor, sample: Tensor, scaling: float, adapter: Tensor, *, inplace: bool
) -> Tensor:
    """All adapters as one of rank L * R, in which the scalars of a row are zero outside its own adapter's R columns."""
    own = adapter.unsqueeze(1) == torch.arange(a.shape[0], device=adapter.device)  # [S, L]
    wide = (own.unsqueeze(2) * s.unsqueeze(1)).flatten(1)  # [S, L * R]
    return _one_adapter(y, x, a.flatten(0, 1), b.transpose(0, 1).flatten(1), wide, sample, scaling, inplace=inplace)


def _one_by_one(
    y: Tensor, x: Tensor, a: Tensor, b: Tensor, s: Tensor, sample: Tensor, scaling: float, adapter: Tensor, *, inplace: bool
) -> Tensor:
    """Each adapter in turn, for its own rows."""
    fan_out = y.shape[0] // x.shape[0]
    of_row = adapter.index_select(0, sample)  # [M]
    result = y if inplace else y.clone()
    for which in range(a.shape[0]):
        rows = (of_row == which).nonzero().squeeze(1)
        part = _one_adapter(y[rows], x[rows // fan_out], a[which], b[which], s, sample[rows], scaling, inplace=inplace)
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
