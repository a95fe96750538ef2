"""Keys and values of the tokens that stand before a pass's own, as plain data. `pass_cache` gives them to transformers."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Prefix:
    """The first P tokens of a prompt under S samples.

    Attributes:
        layers: keys and values of each decoder block, [S, heads, P, d]; [1, heads, P, d] in the first `shared` blocks.
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
        """Samples `start` to `stop` - 1, without a copy."""
        if self.shared == len(self.layers) or (start, stop) == (0, len(self.layers[-1][0])):
            return self
        rest = tuple((keys[start:stop], values[start:stop]) for keys, values in self.layers[self.shared :])
        return Prefix(self.layers[: self.shared] + rest, self.shared)


@dataclass(frozen=True, eq=False)
class Past:
    """The prefix that all inputs of a pass have in common, under each of the pass's draws.

    Attributes:
        parts: `Draws.key` -> prefixes whose samples, one prefix after another, are those of the draws; at least one entry.
        length: P, how many tokens of each prefix count.
    """

    parts: Mapping[Hashable, Sequence[Prefix]]
    length: int

    @property
    def shared(self) -> int:
        """The first decoder blocks, whose keys and values are the same for every sample."""
        return next(iter(self.parts.values()))[0].shared
