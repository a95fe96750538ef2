"""The token positions of a packed pass, which has no padding: all rows' tokens are concatenated in one row.

The attention of such a pass is in `packed_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from scalabl.base.transfer import moved, on_host

# What attention over one more group of rows costs outside of a CPU, in tokens: its launches in every block. Not measured:
# 20 microseconds a block are assumed, beside what the products of a token take in models of 1 to 7 billion parameters.
GROUP_TOKENS = 64


def packing_pays(lengths: Tensor, counts: Sequence[int], device: torch.device) -> bool:
    """Whether a pass over inputs of these lengths [B], with these numbers of rows, takes less without padding."""
    if on_host(device):
        return True
    tokens: list[int] = lengths.tolist()
    padding = sum((max(tokens) - length) * count for length, count in zip(tokens, counts, strict=True))
    return padding >= GROUP_TOKENS * (len(set(tokens)) - 1)


@dataclass(frozen=True)
class Layout:
    """Concatenated rows, in groups of equal length.

    Attributes:
        groups: (number of rows, tokens of each) of consecutive groups.
        tokens: number of tokens of all rows.
        last: [rows], the position of each row's last token.
    """

    groups: tuple[tuple[int, int], ...]
    tokens: int
    last: Tensor

    @classmethod
    def of(cls, lengths: Tensor) -> Layout:
        """The layout of rows of these lengths [rows], in which equal lengths are consecutive."""
        length, count = torch.unique_consecutive(lengths, return_counts=True)
        ends = lengths.cumsum(0)
        return cls(tuple(zip(count.tolist(), length.tolist(), strict=True)), int(ends[-1]), ends - 1)


@dataclass(frozen=True)
class Packing:
    """The layouts of a packed pass over B inputs in order of length (N tokens) that fan out to M rows (N' tokens).

    Attributes:
        inputs, rows: the layouts before and after inputs fan out.
        input_of_token, position_of_token: [N], for each token of the inputs: its input, and its position in that input.
        row_of_token: [N'], the row of each token of the rows.
        source: [N'], for each token of the rows: the token of the inputs of which it is a copy.
        copy: [N], for each token of the inputs: its first copy among the tokens of the rows.
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
        """The packing of inputs with these lengths [B], ascending, and these numbers of rows."""
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

    def to(self, device: torch.device) -> Packing:
        """The same packing with its tables on the device; they are on the CPU before."""
        tables = (self.inputs.last, self.rows.last, self.input_of_token, self.position_of_token)
        inputs_last, rows_last, input_of_token, position, row, source, copy = moved(
            (*tables, self.row_of_token, self.source, self.copy), device
        )
        inputs, rows = replace(self.inputs, last=inputs_last), replace(self.rows, last=rows_last)
        return Packing(inputs, rows, input_of_token, position, row, source, copy)

    def layout_of(self, tokens: int) -> Layout:
        """The layout with this number of tokens; if there are as many rows as inputs, the two layouts are equal."""
        return self.inputs if tokens == self.inputs.tokens else self.rows

    def pack(self, padded: Tensor) -> Tensor:
        """[B, T, ...] right-padded -> [1, N, ...]."""
        return padded[self.input_of_token, self.position_of_token].unsqueeze(0)
