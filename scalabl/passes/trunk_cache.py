"""What the trunk gives for each row of a training set, kept so that later epochs start at the first adapted layer."""

from __future__ import annotations

import torch
from torch import Tensor

from scalabl.evaluation.inference import EncodedSet, batches
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.model.token_batch import TokenBatch

BATCH_TOKENS = 4096


class TrunkCache:
    """States [T, D] of every row of a data set, in the base model's dtype, on the CPU.

    Args:
        model: whose trunk `has_states`.
    """

    def __init__(self, model: ScalaBLModel, encoded: EncodedSet) -> None:
        self._device = model.device
        self._states: dict[int, Tensor] = {}
        for batch in batches([len(ids) for ids in encoded.sequences], 1, BATCH_TOKENS):
            ids, lengths = TokenBatch.of([encoded.sequences[i] for i in batch]).right_padded()
            states = model.trunk_states(ids.to(self._device)).cpu()
            # Copies: a view would keep the padded batch alive.
            self._states |= {i: states[row, : lengths[row]].clone() for row, i in enumerate(batch)}

    def of(self, rows: Tensor, width: int) -> Tensor:
        """[B] indices of the data set -> [B, width, D], right-padded with zeros, which causal attention never sees."""
        each = [self._states[i] for i in rows.tolist()]
        padded = each[0].new_zeros(len(each), width, each[0].shape[1])
        for row, states in enumerate(each):
            padded[row, : len(states)] = states
        return padded.to(self._device)


def trunk_cache(model: ScalaBLModel, encoded: EncodedSet, limit_gib: float) -> TrunkCache | None:
    """The cache of a data set; None where there is no trunk to skip, or its states would take more than the limit."""
    if not model.trunk.has_states:
        return None
    width = model.base.get_input_embeddings().weight.shape[1]
    size = sum(map(len, encoded.sequences)) * width * torch.finfo(model.base.dtype).bits / 8
    return TrunkCache(model, encoded) if size <= limit_gib * 2**30 else None
