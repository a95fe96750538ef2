"""Where tokens lie in a pass without padding: end to end in one row. The attention of such a pass: `packed_attention`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


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
