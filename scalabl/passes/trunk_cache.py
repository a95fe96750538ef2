"""The trunk's states of many sequences, kept so that later passes start at the first adapted layer.

How the trunk computes them is in `model.trunk`; a prompt's beginning that requests share is kept by `prefix_cache`.
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
    """States [T, D] of every sequence, in the base model's dtype, on the CPU.

    Args:
        model: whose trunk `has_states`.
        sequences: token ids of each.
    """

    def __init__(self, model: ScalaBLModel, sequences: Sequence[Sequence[int]]) -> None:
        self._device = model.device
        self._states: dict[int, Tensor] = {}
        for batch in batches([len(ids) for ids in sequences], 1, BATCH_TOKENS):
            ids, lengths = TokenBatch.of([sequences[i] for i in batch]).right_padded()
            states = model.trunk_states(ids.to(self._device)).cpu()
            # Copies: a view would keep the padded batch alive.
            self._states |= {i: states[row, : lengths[row]].clone() for row, i in enumerate(batch)}

    def of(self, indices: Tensor, width: int) -> Tensor:
        """[B] indices of the sequences -> [B, width, D], right-padded with zeros, which causal attention never sees."""
        selected = [self._states[i] for i in indices.tolist()]
        padded = selected[0].new_zeros(len(selected), width, selected[0].shape[1])
        for row, states in enumerate(selected):
            padded[row, : len(states)] = states
        return padded.to(self._device)


def trunk_cache(model: ScalaBLModel, sequences: Sequence[Sequence[int]], limit_gib: float) -> TrunkCache | None:
    """The cache of some sequences; None where there is no trunk to skip, or its states would take more than the limit."""
    if not model.trunk.has_states:
        return None
    width = model.base.get_input_embeddings().weight.shape[1]
    size = sum(map(len, sequences)) * width * torch.finfo(model.base.dtype).bits / 8
    return TrunkCache(model, sequences) if size <= limit_gib * 2**30 else None
