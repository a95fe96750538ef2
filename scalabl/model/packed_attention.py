"""Attention of packed passes, which have no padding: SDPA attention over the rows of one length at a time.

All rows' tokens are concatenated in one row (`packing`). Only attention needs to know the rows: every other layer of a
decoder treats each token by itself. transformers lets an attention function and a mask function be registered under a name;
during a packed pass the model uses this name. At start-up, `passes.probes` tests whether it works for an architecture.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from scalabl.base.placement import is_divided
from scalabl.model.forward_pass import ForwardPass, running
from scalabl.model.pass_cache import with_past

NAME = "scalabl_packed"
INNER = "sdpa"  # the attention that the model must be configured with


class _Masks:
    """Stands in for the model's attention mask: one mask for each row length, created when it is first needed."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._arguments = arguments
        self._by_length: dict[int, Tensor | None] = {}

    def of(self, length: int, before: int) -> Tensor | None:
        """Mask [1, 1, length, before + length], True where a token is seen; None for the ordinary causal mask."""
        if length not in self._by_length:
            mask = sdpa_mask(batch_size=1, q_length=length, kv_length=before + length, **self._arguments)
            self._by_length[length] = mask
        return self._by_length[length]


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: _Masks | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """[1, H, N, d] each -> [1, N, H, d]."""
    forward_pass = running()
    assert forward_pass is not None  # the name is only set inside `packed`
    assert forward_pass.packing is not None
    layout = forward_pass.packing.layout_of(query.shape[2])
    outputs, start, first = [], 0, 0
    for rows, length in layout.groups:
        q, k, v = (_group(tensor, start, rows, length) for tensor in (query, key, value))
        if forward_pass.past is not None:
            block = int(module.layer_idx)  # type: ignore[arg-type]  # the index of its decoder block
            k, v = with_past(forward_pass, block, k, v, first)
        mask = None if attention_mask is None else attention_mask.of(length, k.shape[2] - length)
        outputs.append(sdpa_attention_forward(module, q, k, v, mask, **kwargs)[0].flatten(0, 1))
        start, first = start + rows * length, first + rows
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).unsqueeze(0), None


def _group(tensor: Tensor, start: int, rows: int, length: int) -> Tensor:
    """[1, H, N, d] -> [rows, H, length, d]."""
    heads, _, width = tensor.shape[1:]
    return tensor[0, :, start : start + rows * length].reshape(heads, rows, length, width).transpose(0, 1)


def _masks(*, batch_size: int, q_length: int, kv_length: int, attention_mask: Tensor | None, **rest: Any) -> _Masks:
    return _Masks(rest)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _masks)


def may_pack(base: PreTrainedModel) -> bool:
    """Whether to try packed passes: with SDPA attention, and the whole model on one device."""
    return not is_divided(base) and bool(base.config._attn_implementation == INNER)


@contextmanager
def packed(base: PreTrainedModel, forward_pass: ForwardPass) -> Iterator[dict[str, Tensor]]:
    """Switches the base model to packed attention; yields the arguments that a packed pass needs besides token ids.

    For a pass that is not packed, nothing changes and there are no such arguments.
    """
    packing = forward_pass.packing
    if packing is None:
        yield {}
        return
    before = base.config._attn_implementation
    base.config._attn_implementation = NAME
    try:
        # With an explicit mask transformers does not detect packed rows by itself, which would create a mask of N x N.
        ones = torch.ones(1, packing.inputs.tokens, dtype=torch.int64, device=packing.position_of_token.device)
        positions = packing.position_of_token + (0 if forward_pass.past is None else forward_pass.past.length)
        yield {"position_ids": positions.unsqueeze(0), "attention_mask": ones}
    finally:
        base.config._attn_implementation = before
