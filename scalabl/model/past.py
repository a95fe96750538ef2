"""Keys and values of the tokens that stand before a pass's own, in the form in which transformers takes them.

Transformers' own cache holds what was computed for every row. This one is given one row for each sample (and one for all of
them in the trunk), spreads it over the rows of a pass a block at a time, and holds nothing but what it is asked to keep.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from scalabl.model.posterior import Draws

Layer = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Prefix:
    """The first P tokens of a prompt under S samples.

    Attributes:
        layers: keys and values of each decoder block, [S, heads, P, d]; [1, heads, P, d] in the first `shared` blocks.
    """

    layers: tuple[Layer, ...]
    shared: int

    @property
    def length(self) -> int:
        return int(self.layers[0][0].shape[2])

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)

    def samples(self, start: int, stop: int) -> Prefix:
        """Some of the samples, without a copy."""
        if self.shared == len(self.layers) or (start, stop) == (0, len(self.layers[-1][0])):
            return self
        rest = tuple((keys[start:stop], values[start:stop]) for keys, values in self.layers[self.shared :])
        return Prefix(self.layers[: self.shared] + rest, self.shared)


class Past(Cache):  # type: ignore[misc]  # transformers does not type this module
    """What one pass is given of the tokens before its own, and what it keeps of all of them.

    Args:
        blocks: decoder blocks of the model.
        shared: the first blocks, which have one row for each input of the pass; the others have one for each sample.
        parts: id of draws -> prefixes that have their samples, one after another; empty for a pass that begins with the
            first token.
        length: P, how many tokens of each prefix count.
        keeps: whether the pass's own keys and values are wanted too.

    Attributes:
        order: the different draws of the pass, as their samples follow in its table; the model sets it.
    """

    def __init__(
        self, blocks: int, shared: int, parts: Mapping[int, Sequence[Prefix]], length: int, *, keeps: bool = False
    ) -> None:
        self.shared, self.parts, self.length, self.keeps = shared, parts, length, keeps
        self.order: Sequence[Draws] = ()
        self._sample: Tensor | None = None
        self._packed = False
        own = cast(Past, weakref.proxy(self))  # no cycle, so that what it holds goes with it
        self._blocks = [_Block(own, place) for place in range(blocks)]
        super().__init__(layers=list(self._blocks))

    def begin(self, sample: Tensor | None, *, packed: bool) -> None:
        """A pass begins.

        Args:
            sample: [M] int64, the sample of each row.
            packed: its rows lie end to end, and its attention asks for what is `joined`.
        """
        self._sample, self._packed = sample, packed

    def prefix(self) -> Prefix:
        """What was kept.

        Raises:
            ValueError: a block has computed no keys and values.
        """
        found = tuple(block.kept for block in self._blocks if block.kept is not None)
        if len(found) != len(self._blocks):
            raise ValueError("a decoder block computed no keys and values of its own")
        return Prefix(found, self.shared)

    def given(self, place: int, keys: Tensor, values: Tensor) -> Layer:
        """What a block's attention is given for its own keys and values."""
        return (keys, values) if self._packed else self.joined(place, keys, values)

    def joined(self, place: int, keys: Tensor, values: Tensor, first: int = 0) -> Layer:
        """Keys and values of a block for its rows from the `first` on, [rows, heads, T, d] -> [rows, heads, P + T, d]."""
        if not self.parts:
            return keys, values
        both = []
        for which, own in enumerate((keys, values)):
            if place < self.shared:
                one = next(iter(self.parts.values()))[0]
                before = one.layers[place][which].expand(len(own), -1, -1, -1)
            else:
                assert self._sample is not None
                samples = [part.layers[place][which] for draws in self.order for part in self.parts[id(draws)]]
                sample = self._sample[first : first + len(own)].to(own.device)
                before = _cat([each[:, :, : self.length] for each in samples]).index_select(0, sample)
            both.append(torch.cat([before[:, :, : self.length], own], dim=2))
        return both[0], both[1]


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


class _Block(CacheLayerMixin):  # type: ignore[misc]  # as above
    """One decoder block's part of a `Past`."""

    is_sliding = False  # all tokens are there, and the mask says which of them count

    def __init__(self, past: Past, place: int) -> None:
        super().__init__()
        self._past, self._place = past, place
        self.kept: Layer | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is made beforehand."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Layer:
        """A pass's own keys and values, with those before them."""
        whole = self._past.given(self._place, key_states, value_states)
        if self._past.keeps:  # put together here as it is; else a copy, since it may be part of something larger
            self.kept = whole if self._past.parts else (key_states.clone(), value_states.clone())
        return whole

    def get_seq_length(self) -> int:
        return self._past.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._past.length + query_length, 0

    def get_max_length(self) -> int:
        return -1


def arguments(past: Past | None) -> dict[str, Any]:
    """What tells a transformers model of it."""
    return {"use_cache": False} if past is None else {"past_key_values": past, "use_cache": True}
