"""Inputs for several adapters of one base model in one pass: the rows are told apart by the kernel's adapter index.

Adapters can share a pass if their decoder blocks have the same adapted modules, rank and scaling, and if all of them or
none have heads of their own (`pass_shape`); they may differ in members, choices and task. One adapter is attached and runs
the pass with the matrices of all; each row's logits come from the head of its own adapter. Prompts that begin after a cached
prefix stay in passes of their own adapter.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

import torch
from scalabl_kernels import runs_fused
from scalabl_kernels.launch import WARM_UP_ROWS
from torch import Tensor

from scalabl.base.int8 import unrounded
from scalabl.base.transfer import moved
from scalabl.model.forward_pass import Reading, RowSamples, Share
from scalabl.model.posterior import Draws
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.model.token_batch import TokenBatch
from scalabl.passes.exactness import PROBE_ERRORS, are_alike
from scalabl.passes.prefix_cache import PrefixCache
from scalabl.passes.rounds import Rounds

KEPT = 4  # combinations of adapters whose matrices are kept from pass to pass


def pass_shape(model: ScalaBLModel) -> Hashable:
    """Adapters of one base model can share a pass if this is equal; known after `probes.find_shared_work`."""
    if model.positions_depend_on_pass:
        return id(model)  # such passes may be divided, and then rows are not where the other adapters look for them
    form = model.own_head is not None, model.masks, model.trunk.verified, model.trunk.trims, model.packs
    return tuple(model.adapted), model.config.r, model.config.scaling, model.base.dtype, *form


class SideBySide:
    """Adapters with equal `pass_shape` that share passes.

    It has a copy of their matrices, one stack for each adapted layer.
    """

    def __init__(self, models: Sequence[ScalaBLModel]) -> None:
        self.models = tuple(models)
        self._first_member = [0]
        for model in self.models:
            self._first_member.append(self._first_member[-1] + model.members)
        self._matrices = {
            index * model.config.r: (
                torch.cat([_stack(own.adapted[name].lora_A, own) for own in self.models]),
                torch.cat([_stack(own.adapted[name].lora_B, own) for own in self.models]),
            )
            for model in self.models[:1]
            for index, name in enumerate(model.adapted)
            if name != model.head_name
        }

    @torch.inference_mode()
    def readings(
        self, batch: TokenBatch, draws: Sequence[Draws], adapters: Sequence[int], states: Tensor | None = None
    ) -> list[Reading]:
        """One forward pass over B inputs: logits [K_b, C], C the choices of the input's adapter, and hidden state of each.

        Args:
            draws: of each input, for its adapter.
            adapters: of each input, its adapter's place in `models`.
            states: as of `ForwardPass`, of a batch that is right-padded.
        """

        def sample_rows(order: Sequence[int]) -> tuple[RowSamples, list[int]]:
            return self._row_samples([draws[place] for place in order], [adapters[place] for place in order])

        readings = self.models[0].run_inputs(batch, sample_rows, states)
        return [
            replace(reading, logits=reading.logits[:, : self.models[adapter].num_choices])
            for reading, adapter in zip(readings, adapters, strict=True)
        ]

    def warm_up(self) -> None:
        """Run the kernel for several adapters at every launch shape, so that no request waits for its compilation."""
        if not runs_fused(self.models[0].device):
            return
        for rows in WARM_UP_ROWS:
            adapters = [number % len(self.models) for number in range(max(rows, len(self.models)))]
            draws = [self.models[adapter].mean_draw() for adapter in adapters]
            self.readings(TokenBatch.of([[0]] * len(adapters)), draws, adapters)

    def _row_samples(self, draws: Sequence[Draws], adapters: Sequence[int]) -> tuple[RowSamples, list[int]]:
        """As `ScalaBLModel.row_samples`, for inputs with these adapters."""
        counts = torch.tensor([of_input.num_samples for of_input in draws])
        input_of_row = torch.repeat_interleave(torch.arange(len(draws)), counts)
        of_row = torch.tensor(adapters)[input_of_row]  # on the host, so that no pass waits for what the device counts
        places = list(dict.fromkeys(adapters))
        tables = [input_of_row, *((of_row == place).nonzero()[:, 0] for place in places)]
        inputs, *rows_of = moved(tables, self.models[0].device)
        sample = torch.empty_like(inputs)
        scalars: list[Tensor] = []
        members: list[Tensor] = []
        shares, first = [], 0
        for place, rows in zip(places, rows_of, strict=True):
            model = self.models[place]
            own = [of_input for of_input, adapter in zip(draws, adapters, strict=True) if adapter == place]
            samples, _ = model.row_samples(own)
            sample[rows] = samples.sample + first
            member = samples.s.new_zeros(len(samples.s), dtype=torch.int64) if samples.member is None else samples.member
            scalars.append(samples.s)
            members.append(member + self._first_member[place])
            shares.append(Share(rows, samples, model.head.of_rows))
            first += len(samples.s)
        each = counts.tolist()
        together = RowSamples(
            s=torch.cat(scalars),
            sample=sample,
            fan_out=each[0] if len(set(each)) == 1 else 1,
            inputs=inputs if max(each) > 1 else None,
            member=torch.cat(members),
            shares=shares,
            matrices=self._matrices,
        )
        return together, each


def _stack(matrix: Tensor, model: ScalaBLModel) -> Tensor:
    return matrix if model.members > 1 else matrix.unsqueeze(0)


@unrounded()
@torch.inference_mode()
def agree_side_by_side(one: ScalaBLModel, other: ScalaBLModel) -> bool:
    """Whether two adapters with equal `pass_shape` have the same logits in a shared pass as in passes of their own."""
    vocabulary = one.base.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (4, 7), generator=torch.Generator().manual_seed(0))
    batch = TokenBatch.of([ids[row, : 7 - 2 * row].tolist() for row in range(4)])
    models, adapters = (one, other), (0, 1, 1, 0)
    draws = [models[place].draws(2 * models[place].members, scheme="antithetic") for place in adapters]
    expected = [
        models[place].logits(TokenBatch.of([ids[row, : 7 - 2 * row].tolist()]), draws[row])[0]
        for row, place in enumerate(adapters)
    ]
    try:
        logits = [reading.logits for reading in SideBySide(models).readings(batch, draws, adapters)]
    except PROBE_ERRORS:
        return False  # the architecture does not support it
    return all(are_alike(one.base, [found], [wanted]) for found, wanted in zip(logits, expected, strict=True))


class Combinations:
    """The combinations of adapters that shared passes lately, with the copies of their matrices."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[int, ...], SideBySide] = OrderedDict()

    def of(self, models: Sequence[ScalaBLModel]) -> SideBySide:
        """The combination of these adapters, in any order."""
        key = tuple(sorted(map(id, models)))
        if key not in self._kept:
            self._kept[key] = SideBySide(models)
            if len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def forget(self, model: ScalaBLModel) -> None:
        """Drop the combinations with an adapter that is unloaded."""
        for key in [key for key in self._kept if id(model) in key]:
            del self._kept[key]


class SharedRounds:
    """As `Rounds`, over prompts for several adapters with equal `pass_shape`.

    Args:
        models: the adapter of each prompt, by the prompts' indices.
        caches: the prefix cache of each adapter; without one its prompts run from their first tokens.
    """

    def __init__(
        self,
        models: Mapping[int, ScalaBLModel],
        sequences: Mapping[int, Sequence[int]],
        draws: Mapping[int, Draws],
        caches: Mapping[ScalaBLModel, PrefixCache | None],
        combinations: Combinations,
        *,
        keeps_trunk: bool,
    ) -> None:
        self._models, self._sequences, self._combinations = models, sequences, combinations
        self._rounds: dict[ScalaBLModel, Rounds] = {}
        whole: dict[ScalaBLModel, list[int]] = {}
        for model in dict.fromkeys(models.values()):
            own = [index for index in sequences if models[index] is model]
            prompts, first = {index: sequences[index] for index in own}, {index: draws[index] for index in own}
            self._rounds[model] = Rounds(model, prompts, first, caches.get(model), keeps_trunk=keeps_trunk)
            whole[model] = self._rounds[model].without_prefix
        several = sum(map(bool, whole.values())) > 1
        self._shared = [index for indices in whole.values() for index in indices] if several else []
        first_model = next(iter(self._rounds))
        self._keeps_trunk = keeps_trunk and first_model.trunk.has_states
        self._states: Tensor | None = None

    def readings(self, draws: Mapping[int, Draws]) -> dict[int, Reading]:
        """Run one round over the prompts in `draws`: index -> logits and hidden state, on the CPU."""
        readings: dict[int, Reading] = {}
        shared = [index for index in self._shared if index in draws]
        for model, rounds in self._rounds.items():
            own = {i: d for i, d in draws.items() if self._models[i] is model and i not in self._shared}
            readings |= rounds.readings(own) if own else {}
        if shared:
            readings |= self._pass(shared, [draws[index] for index in shared])
        return {index: readings[index] for index in draws}

    def _pass(self, indices: Sequence[int], draws: Sequence[Draws]) -> dict[int, Reading]:
        models = list(dict.fromkeys(self._models[index] for index in indices))
        batch, states = self._batch(indices), None
        if self._keeps_trunk:
            if self._states is None:
                ids, lengths = moved([*self._batch(self._shared).right_padded()], models[0].device)
                self._states = models[0].trunk_states(ids, lengths)
            (places,) = moved([torch.tensor([self._shared.index(index) for index in indices])], models[0].device)
            states = self._states[places, : batch.input_ids.shape[1]]
        if len(models) == 1:  # in a later round
            readings = models[0].readings(batch, draws, states)
        else:
            combination = self._combinations.of(models)
            adapters = [combination.models.index(self._models[index]) for index in indices]
            readings = combination.readings(batch, draws, adapters, states)
        return {index: reading.cpu() for index, reading in zip(indices, readings, strict=True)}

    def _batch(self, indices: Sequence[int]) -> TokenBatch:
        return TokenBatch.of([self._sequences[index] for index in indices])
