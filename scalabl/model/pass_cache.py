"""The key-value cache of one pass, as a transformers `Cache`: joins a cached prefix with the pass's own tokens.

Transformers' own cache has keys and values for every row. Here the prefix has them once for each sample (in the trunk once
for all samples); they are copied to the rows of the pass one block at a time. Keys and values of the pass itself are stored
only if it asks for that. Which prefixes are cached from pass to pass is decided in `passes.prefix_cache`.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from scalabl.model.forward_pass import ForwardPass
from scalabl.model.past import KeysValues, Prefix


def with_past(forward_pass: ForwardPass, block: int, keys: Tensor, values: Tensor, first: int = 0) -> KeysValues:
    """Put the keys and values of the pass's past before those of a decoder block: [rows, heads, T, d] -> [.., P + T, d].

    Args:
        first: the number of the first row in the pass.
    """
    past = forward_pass.past
    if past is None:
        return keys, values
    joined = []
    for which, own in enumerate((keys, values)):
        if block < past.shared:
            prefix = next(iter(past.parts.values()))[0]
            before = prefix.layers[block][which].expand(len(own), -1, -1, -1)
        else:
            assert forward_pass.samples is not None  # only the trunk runs without them, and its blocks are shared
            samples = [part.layers[block][which] for key in forward_pass.samples.draws for part in past.parts[key]]
            sample = forward_pass.samples.sample[first : first + len(own)].to(own.device)
            before = _concatenated([tensor[:, :, : past.length] for tensor in samples]).index_select(0, sample)
        joined.append(torch.cat([before[:, :, : past.length], own], dim=2))
    return joined[0], joined[1]


def _concatenated(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


class PassCache(Cache):  # type: ignore[misc]  # transformers does not type this module
    """The cache of one pass.

    Args:
        num_blocks: number of decoder blocks of the model.
    """

    def __init__(self, forward_pass: ForwardPass, num_blocks: int) -> None:
        self.forward_pass = forward_pass
        cache = cast(PassCache, weakref.proxy(self))  # avoids a reference cycle, so that memory is freed at once
        self._blocks = [_BlockCache(cache, block) for block in range(num_blocks)]
        super().__init__(layers=list(self._blocks))

    @property
    def past_length(self) -> int:
        """P, the number of tokens before the pass's own."""
        return 0 if self.forward_pass.past is None else self.forward_pass.past.length

    def prefix(self, shared: int) -> Prefix:
        """The keys and values that the pass stored, of its own tokens and the past.

        Args:
            shared: the number of first decoder blocks that computed one row for all samples.

        Raises:
            ValueError: a block has computed no keys and values.
        """
        layers = tuple(block.stored for block in self._blocks if block.stored is not None)
        if len(layers) != len(self._blocks):
            raise ValueError("a decoder block computed no keys and values of its own")
        return Prefix(layers, shared)


class _BlockCache(CacheLayerMixin):  # type: ignore[misc]  # as above
    """One decoder block's part of a `PassCache`."""

    is_sliding = False  # the cache has all tokens, and the mask says which of them are seen

    def __init__(self, cache: PassCache, block: int) -> None:
        super().__init__()
        self._cache, self._block = cache, block
        self.stored: KeysValues | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Required by transformers; nothing is allocated in advance."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> KeysValues:
        """The pass's own keys and values, after those of its past. A packed pass adds the past in its attention."""
        forward_pass = self._cache.forward_pass
        if forward_pass.packing is not None:
            return key_states, value_states
        whole = with_past(forward_pass, self._block, key_states, value_states)
        if forward_pass.keeps:  # without a past, copy: the tensors may be views of larger ones
            self.stored = whole if forward_pass.past is not None else (key_states.clone(), value_states.clone())
        return whole

    def get_seq_length(self) -> int:
        return self._cache.past_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.past_length + query_length, 0

    def get_max_length(self) -> int:
        return -1
