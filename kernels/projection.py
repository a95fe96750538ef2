"""The dispatcher: checks the operands and picks the form of `subspace_projection` that runs on their device."""

from __future__ import annotations

from torch import Tensor

from kernels.reference import subspace_projection_torch


def subspace_projection(
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
    """y[m] + scaling * B (s[sample[m]] * (A x[m])) for every row m, without a copy of any weight per sample.

    Args:
        y: [M, ..., d_out], the base layer's output.
        x: [M, ..., d_in], the base layer's input, of the same dtype and middle dimensions as y.
        lora_a: [R, d_in], the shared down-projection A.
        lora_b: [d_out, R], the shared up-projection B.
        s: [S, R], the table of posterior samples of the R subspace scalars.
        sample: [M] int64, the row of `s` that each row of x uses.
        scaling: alpha / R.
        inplace: add into y and return it (serving); otherwise leave y alone (training).

    Returns:
        [M, ..., d_out]: y itself when `inplace`, a new tensor otherwise.

    Raises:
        ValueError: when the shapes do not fit one another; the message names the operand.

    Source: Samplawski et al. 2025 (arXiv 2506.21408), W_k = W0 + scaling * B diag(s_k) A.
    """
    rank, d_in = lora_a.shape
    d_out = lora_b.shape[0]
    if x.shape[-1] != d_in:
        raise ValueError(f"x has {x.shape[-1]} columns, lora_a expects {d_in}")
    if lora_b.shape[1] != rank or s.shape[-1] != rank:
        raise ValueError(f"ranks differ: lora_a {rank}, lora_b {lora_b.shape[1]}, s {s.shape[-1]}")
    if y.shape != (*x.shape[:-1], d_out):
        raise ValueError(f"y has shape {tuple(y.shape)}, expected {(*x.shape[:-1], d_out)}")
    if sample.shape != x.shape[:1]:
        raise ValueError(f"sample has shape {tuple(sample.shape)}, expected one index for each of {x.shape[0]} rows")
    return subspace_projection_torch(y, x, lora_a, lora_b, s, sample, scaling, inplace=inplace)
