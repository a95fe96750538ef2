"""The language model's output head, reduced to the choice tokens and read at one position. It is adapted in `layer`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from scalabl.base.placement import device_of
from scalabl.model.forward_pass import RowSamples, Share, running
from scalabl.model.layer import SubspaceLinear


class ChoiceHead(nn.Module):
    """A language model's head with the rows of the choice tokens only, computed at each row's last position only.

    Args:
        inner: [..., D] -> [..., C], the reduced head, adapted or not.

    Raises:
        RuntimeError: it is called outside of a pass.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self._device = device_of(inner)

    def forward(self, hidden: Tensor) -> Tensor:
        """[M, T, D] -> [M, 1, C]; [B, T, D] -> [M, 1, C] where rows fan out here; [1, N, D] -> [M, 1, C] when packed."""
        forward_pass = running()
        if forward_pass is None:
            raise RuntimeError("the choice head needs a forward pass; run the model through ScalaBLModel.logits")
        last = forward_pass.last.to(hidden.device)
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        picked = hidden[rows, last] if forward_pass.packing is None else hidden[0, last]
        if forward_pass.inputs is not None and not forward_pass.spreads_in_blocks:
            picked = picked[forward_pass.inputs.to(picked.device)]
        picked = picked.to(self._device)
        if forward_pass.samples is not None and forward_pass.samples.shares:
            return _of_shares(picked, forward_pass.samples.shares).unsqueeze(1)
        logits: Tensor = self.inner(picked)
        return logits.unsqueeze(1)

    def of_rows(self, picked: Tensor, samples: RowSamples) -> Tensor:
        """[M, D] -> [M, C] for rows with these samples, of a pass that another adapter runs."""
        logits: Tensor = (
            self.inner.of_rows(picked, samples) if isinstance(self.inner, SubspaceLinear) else self.inner(picked)
        )
        return logits


def _of_shares(picked: Tensor, shares: Sequence[Share]) -> Tensor:
    """[M, D] -> [M, C], C the most choices of any adapter; zero for choices that a row's own adapter does not have."""
    of_each = [share.head(picked[share.rows.to(picked.device)], share.samples) for share in shares]
    logits = of_each[0].new_zeros(len(picked), max(part.shape[1] for part in of_each))
    for share, part in zip(shares, of_each, strict=True):
        logits[share.rows.to(picked.device), : part.shape[1]] = part
    return logits


def cut_head(head: nn.Module, choice_tokens: tuple[int, ...]) -> nn.Linear:
    """The rows of a language model's head that belong to the choice tokens, as a linear layer [D] -> [C].

    The rows are copied, so embeddings that share the head's weight are not affected.

    Raises:
        ValueError: a token is outside the vocabulary, or the head's weight cannot be read row by row (quantised).
    """
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dim() != 2:
        raise ValueError("the head's weight is quantised; load the base model with its head in floating point")
    vocabulary = weight.shape[0]
    outside = [token for token in choice_tokens if token >= vocabulary]
    if outside:
        raise ValueError(f"choice token {outside[0]} is outside the base model's vocabulary of {vocabulary}")
    bias = getattr(head, "bias", None)
    rows = torch.tensor(choice_tokens, device=weight.device)
    cut = nn.Linear(weight.shape[1], len(choice_tokens), bias=bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        cut.weight.copy_(weight[rows])
        if bias is not None:
            cut.bias.copy_(bias[rows])
    return cut.requires_grad_(False)


def own_head(head: nn.Module, choices: int) -> nn.Linear:
    """An adapter's own rows, as a linear layer [D] -> [C] of zeros beside a language model's head, which it replaces.

    Raises:
        ValueError: the head's weight is quantised, so that the dtype of its input is not known.
    """
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dim() != 2:
        raise ValueError("the head's weight is quantised; load the base model with its head in floating point")
    own = nn.Linear(weight.shape[1], choices, bias=False, device=weight.device, dtype=weight.dtype)
    nn.init.zeros_(own.weight)
    return own
