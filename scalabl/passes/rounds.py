"""Several passes over the same prompts, for adaptive sampling: the trunk's output is computed once and reused.

When to stop sampling is decided in `uncertainty.adaptive`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scalabl.base.transfer import moved
from scalabl.model.forward_pass import Reading
from scalabl.model.past import Past
from scalabl.model.posterior import Draws
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.model.token_batch import TokenBatch
from scalabl.passes.grouping import grouped
from scalabl.passes.prefix_cache import PrefixCache


@dataclass
class _Part:
    """The prompts of one pass, which begins after a shared prefix of `start` tokens.

    Attributes:
        names: names of all prefixes that the prompts share (`PrefixCache.names`).
        states: [B, T, D], the trunk's output for the tokens after the prefix; None until it was computed.
    """

    indices: Sequence[int]
    start: int
    names: dict[int, bytes]
    states: Tensor | None = None


class Rounds:
    """A batch of prompts over which more than one pass may run.

    Args:
        sequences: token ids of each prompt, by an index that the caller chooses.
        draws: the draws of the first round, by the same indices. Later rounds continue the same sequences of draws.
        cache: the prefix cache; None to run every prompt from its first token.
        keeps_trunk: whether to store the trunk's output, because there may be more than one pass.
    """

    def __init__(
        self,
        model: ScalaBLModel,
        sequences: Mapping[int, Sequence[int]],
        draws: Mapping[int, Draws],
        cache: PrefixCache | None = None,
        *,
        keeps_trunk: bool,
    ) -> None:
        self._model, self._sequences, self._cache = model, sequences, cache
        self._keeps_trunk = keeps_trunk and model.trunk.has_states
        if cache is None:
            self._parts = [_Part(list(sequences), 0, {})]
        else:
            self._parts = [
                _Part(group.prompts.indices, group.length, group.prompts.common)
                for group in grouped(cache, sequences, draws)
            ]

    @property
    def without_prefix(self) -> list[int]:
        """The prompts that run from their first tokens, by their indices."""
        return [index for part in self._parts if not part.start for index in part.indices]

    def readings(self, draws: Mapping[int, Draws]) -> dict[int, Reading]:
        """Run one round over the prompts in `draws`: index -> logits and hidden state, on the CPU."""
        readings: dict[int, Reading] = {}
        for part in self._parts:
            indices = [index for index in part.indices if index in draws]
            if indices:
                readings |= self._pass(part, indices, [draws[index] for index in indices])
        return {index: readings[index] for index in draws}

    def _pass(self, part: _Part, indices: Sequence[int], draws: Sequence[Draws]) -> dict[int, Reading]:
        past = None
        if self._cache is not None and part.start:
            ids = self._sequences[indices[0]]
            different = list({of_input.key: of_input for of_input in draws}.values())
            past = self._cache.past(ids, part.names, part.start, different)
        batch = self._rest(part, indices)
        states = None
        if self._keeps_trunk:
            if part.states is None:
                part.states = self._trunk(part, past)
            places = torch.tensor([part.indices.index(index) for index in indices])
            states = part.states[moved([places], self._model.device)[0], : batch.input_ids.shape[1]]
        readings = self._model.readings(batch, draws, states, past)
        return {index: reading.cpu() for index, reading in zip(indices, readings, strict=True)}

    def _rest(self, part: _Part, indices: Sequence[int]) -> TokenBatch:
        return TokenBatch.of([self._sequences[index][part.start :] for index in indices])

    def _trunk(self, part: _Part, past: Past | None) -> Tensor:
        ids, lengths = moved([*self._rest(part, part.indices).right_padded()], self._model.device)
        return self._model.trunk_states(ids, lengths, past)
