"""Passes over the same prompts, or some of them, again and again: what no sample changes is computed once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from scalabl.model import ScalaBLModel, TokenBatch
from scalabl.posterior import Draws


class Rounds:
    """A batch of prompts, by any numbers, over which more than one pass may run.

    Args:
        keeps_trunk: whether there may be more passes than one, so that what the trunk gives is worth keeping.
    """

    def __init__(self, model: ScalaBLModel, sequences: Mapping[int, Sequence[int]], *, keeps_trunk: bool) -> None:
        self._model, self._sequences = model, sequences
        trunk = model.trunk
        self._states: Tensor | None = None
        self._rows = {index: row for row, index in enumerate(sequences)}
        if keeps_trunk and trunk.verified and trunk.blocks and trunk.depth:
            ids, _ = TokenBatch.of(list(sequences.values())).right_padded()
            self._states = model.trunk_states(ids.to(model.device))

    def logits(self, draws: Mapping[int, Draws]) -> dict[int, Tensor]:
        """Logits [K, C] on the CPU of those prompts that are given draws, in one forward pass."""
        batch = TokenBatch.of([self._sequences[index] for index in draws])
        states = None
        if self._states is not None:
            states = self._states[[self._rows[index] for index in draws], : batch.input_ids.shape[1]]
        each = self._model.logits_each(batch, list(draws.values()), states)
        return {index: logits.cpu() for index, logits in zip(draws, each, strict=True)}
