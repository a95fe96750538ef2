"""Token ids as a batch: B prompts, padded. How prompts become token ids is in `scalabl.prompt`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenBatch:
    """B tokenised inputs, padded on either side.

    Attributes:
        input_ids: [B, T] int64.
        attention_mask: [B, T], 1 where there is a token; each row has at least one.
    """

    input_ids: Tensor
    attention_mask: Tensor

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]]) -> TokenBatch:
        """Right-padded batch of B token lists."""
        if not sequences or not all(sequences):
            raise ValueError("a batch needs at least one sequence, and each sequence at least one token")
        lengths = [len(sequence) for sequence in sequences]
        width = max(lengths)
        ids = torch.tensor([[*sequence, *[0] * (width - len(sequence))] for sequence in sequences])
        mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
        return cls(ids, mask.long())

    def right_padded(self) -> tuple[Tensor, Tensor]:
        """(ids [B, T'], lengths [B]): each row's tokens moved to the left end, T' the longest row."""
        mask = self.attention_mask.bool()
        lengths = mask.sum(dim=1)
        if int(lengths.min()) < 1:
            raise ValueError("attention_mask has a row without any token")
        order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
        return self.input_ids.gather(1, order)[:, : int(lengths.max())], lengths
