"""Keys and values of the tokens before those of a pass, as plain data. `pass_cache` hands them to transformers."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Prefix:
    """Keys and values of the first P tokens of a prompt under S posterior samples.

    Attributes:
        layers: (keys, values) of each decoder block, [S, heads, P, d]; [1, heads, P, d] in the first `shared` blocks.
        shared: the number of first blocks whose keys and values are the same for all samples.
    """

    layers: tuple[KeysValues, ...]
    shared: int

    @property
    def length(self) -> int:
        return int(self.layers[0][0].shape[2])

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)

    def samples(self, start: int, stop: int) -> Prefix:
        """The prefix under samples `start` to `stop` - 1; views, not copies."""
        if self.shared == len(self.layers) or (start, stop) == (0, len(self.layers[-1][0])):
            return self
        rest = tuple((keys[start:stop], values[start:stop]) for keys, values in self.layers[self.shared :])
        return Prefix(self.layers[: self.shared] + rest, self.shared)


@dataclass(frozen=True, eq=False)
class Past:
    """The prefix that all inputs of a pass have in common, under each of the pass's draws.

    Attributes:
        parts: `Draws.key` -> prefixes whose samples, concatenated, are those of the draws; at least one entry.
        length: P, how many tokens of each prefix are used.
    """

    parts: Mapping[Hashable, Sequence[Prefix]]
    length: int

    @property
    def shared(self) -> int:
        """The number of first decoder blocks whose keys and values are the same for every sample."""
        return next(iter(self.parts.values()))[0].shared
