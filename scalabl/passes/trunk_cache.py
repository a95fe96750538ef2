"""Caches the trunk's output for a data set, so that later passes over it start at the first adapted layer.

How the trunk is run is in `model.trunk`. Prefixes that requests share are cached in `prefix_cache`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.model.token_batch import TokenBatch
from scalabl.passes.batches import batches

BATCH_TOKENS = 4096


class TrunkCache:
    """The trunk's output states [T, D] of every sequence, in the base model's dtype, on the CPU.

    Args:
        model: its trunk must have states (`trunk.has_states`).
        sequences: token ids of each sequence.
    """

    def __init__(self, model: ScalaBLModel, sequences: Sequence[Sequence[int]]) -> None:
        self._device = model.device
        self._states: dict[int, Tensor] = {}
        for batch in batches([len(ids) for ids in sequences], 1, BATCH_TOKENS):
            ids, lengths = TokenBatch.of([sequences[i] for i in batch]).right_padded()
            states = model.trunk_states(ids.to(self._device), lengths.to(self._device)).cpu()
            # Copies, since views would keep the padded batch in memory.
            self._states |= {i: states[row, : lengths[row]].clone() for row, i in enumerate(batch)}

    def of(self, indices: Tensor, width: int) -> Tensor:
        """States [B, width, D] of the sequences with these indices [B], right-padded with zeros."""
        selected = [self._states[i] for i in indices.tolist()]
        padded = selected[0].new_zeros(len(selected), width, selected[0].shape[1])
        for row, states in enumerate(selected):
            padded[row, : len(states)] = states
        return padded.to(self._device)


def trunk_cache(model: ScalaBLModel, sequences: Sequence[Sequence[int]], limit_gib: float) -> TrunkCache | None:
    """A trunk cache of these sequences; None if there is no trunk, or if the states would need more than the limit."""
    if not model.trunk.has_states:
        return None
    width = model.base.get_input_embeddings().weight.shape[1]
    size = sum(map(len, sequences)) * width * torch.finfo(model.base.dtype).bits / 8
    return TrunkCache(model, sequences) if size <= limit_gib * 2**30 else None
