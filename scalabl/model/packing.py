"""Passes without padding: the tokens of all rows lie end to end in one row, and only attention knows where each begins.

Every other layer of a decoder treats each token by itself. Attention is the model's own, over rows of one length at a time.
transformers lets an attention function and the masks that go with it be registered by name; a packed pass runs under that
name. Whether an architecture takes both is found out by `probing`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from scalabl.base.placement import is_divided
from scalabl.model.past import Past

NAME = "scalabl_packed"
INNER = "sdpa"  # what a model must use by itself


@dataclass(frozen=True)
class Layout:
    """Rows that lie end to end, those of one length together.

    Attributes:
        groups: (rows, tokens of each) in their order.
        tokens: of all rows.
        last: [rows], where each one's last token lies.
    """

    groups: tuple[tuple[int, int], ...]
    tokens: int
    last: Tensor

    @classmethod
    def of(cls, lengths: Tensor) -> Layout:
        """Of rows of these lengths, [rows], neighbours where they are equal."""
        length, count = torch.unique_consecutive(lengths, return_counts=True)
        ends = lengths.cumsum(0)
        return cls(tuple(zip(count.tolist(), length.tolist(), strict=True)), int(ends[-1]), ends - 1)


@dataclass(frozen=True)
class Packing:
    """Where everything lies in a pass over B inputs, in order of their lengths, and over M rows, several for each input.

    Attributes:
        inputs, rows: the layouts before and after inputs fan out.
        input_of_token, position_of_token: [N] for each of the inputs' tokens.
        row_of_token: [N'] for each of the rows' tokens.
        source: [N'], the inputs' token that each of the rows' tokens is a copy of.
        copy: [N], the first of the rows' tokens that are copies of each of the inputs' tokens.
    """

    inputs: Layout
    rows: Layout
    input_of_token: Tensor
    position_of_token: Tensor
    row_of_token: Tensor
    source: Tensor
    copy: Tensor

    @classmethod
    def of(cls, lengths: Tensor, counts: Sequence[int]) -> Packing:
        """Of inputs of these lengths [B], ascending, with so many rows each."""
        device = lengths.device
        of_row = torch.arange(len(counts), device=device).repeat_interleave(torch.tensor(counts, device=device))
        starts = lengths.cumsum(0) - lengths
        row_lengths = lengths[of_row]
        row_starts = row_lengths.cumsum(0) - row_lengths
        input_of_token = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
        position = torch.arange(len(input_of_token), device=device) - starts[input_of_token]
        row_of_token = torch.arange(len(of_row), device=device).repeat_interleave(row_lengths)
        source = torch.arange(len(row_of_token), device=device) - (row_starts - starts[of_row])[row_of_token]
        first = torch.tensor([0, *counts[:-1]], device=device).cumsum(0)
        return cls(
            inputs=Layout.of(lengths),
            rows=Layout.of(row_lengths),
            input_of_token=input_of_token,
            position_of_token=position,
            row_of_token=row_of_token,
            source=source,
            copy=row_starts[first][input_of_token] + position,
        )

    def layout_of(self, tokens: int) -> Layout:
        """The layout that has so many tokens: with as many rows as inputs, the two are one."""
        return self.inputs if tokens == self.inputs.tokens else self.rows

    def pack(self, padded: Tensor) -> Tensor:
        """[B, T, ...] right-padded -> [1, N, ...]."""
        return padded[self.input_of_token, self.position_of_token].unsqueeze(0)


class _Masks:
    """What the model takes for its attention mask: one for each length, made when it is first needed."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._arguments = arguments
        self._made: dict[int, Tensor | None] = {}

    def of(self, length: int, before: int) -> Tensor | None:
        """[1, 1, length, before + length], True where a token is seen; None for the causal one."""
        if length not in self._made:
            self._made[length] = sdpa_mask(batch_size=1, q_length=length, kv_length=before + length, **self._arguments)
        return self._made[length]


_running = threading.local()


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: _Masks | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """[1, H, N, d] each -> [1, N, H, d]."""
    packing: Packing = _running.packing
    past: Past | None = _running.past
    layout = packing.layout_of(query.shape[2])
    found, start, first = [], 0, 0
    for rows, length in layout.groups:
        q, k, v = (_group(tensor, start, rows, length) for tensor in (query, key, value))
        if past is not None:
            k, v = past.joined(int(module.layer_idx), k, v, first)  # type: ignore[arg-type]  # an attention's own number
        mask = None if attention_mask is None else attention_mask.of(length, k.shape[2] - length)
        found.append(sdpa_attention_forward(module, q, k, v, mask, **kwargs)[0].flatten(0, 1))
        start, first = start + rows * length, first + rows
    return (found[0] if len(found) == 1 else torch.cat(found)).unsqueeze(0), None


def _group(tensor: Tensor, start: int, rows: int, length: int) -> Tensor:
    """[1, H, N, d] -> [rows, H, length, d]."""
    heads, _, width = tensor.shape[1:]
    return tensor[0, :, start : start + rows * length].reshape(heads, rows, length, width).transpose(0, 1)


def _masks(*, batch_size: int, q_length: int, kv_length: int, attention_mask: Tensor | None, **rest: Any) -> _Masks:
    return _Masks(rest)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _masks)


def may_pack(base: PreTrainedModel) -> bool:
    """Whether to try: where a call costs little beside padding, and attention is of the form that is replaced."""
    return not is_divided(base) and base.device.type == "cpu" and bool(base.config._attn_implementation == INNER)


@contextmanager
def packed(base: PreTrainedModel, packing: Packing, past: Past | None) -> Iterator[dict[str, Tensor]]:
    """A packed pass: yields the arguments that it has besides the token ids [1, N]."""
    before = base.config._attn_implementation
    _running.packing, _running.past = packing, past
    base.config._attn_implementation = NAME
    try:
        # With a mask of its own transformers does not look for packed rows by itself, which costs a mask of N x N.
        ones = torch.ones(1, packing.inputs.tokens, dtype=torch.int64, device=packing.position_of_token.device)
        positions = packing.position_of_token + (0 if past is None else past.length)
        yield {"position_ids": positions.unsqueeze(0), "attention_mask": ones}
    finally:
        base.config._attn_implementation = before
        _running.packing = _running.past = None
