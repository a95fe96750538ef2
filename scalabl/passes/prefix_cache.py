"""Which beginnings of prompts are kept, within a bound of bytes, and found again in later prompts.

A beginning has a name: the chained hash of its blocks of tokens, as in vLLM. It is worth keeping once a second prompt brings
it (or it is the template's own), so that a stream of ever new prompts stores nothing. What is kept serves every shorter
beginning too. Which of a batch's prompts share a pass over what is left of them is `grouping`'s to say.
"""

from __future__ import annotations

import os
from array import array
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from scalabl.model.past import Past, Prefix
from scalabl.model.posterior import Draws
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.passes.prefix import longest_exact

BLOCK = 16  # tokens
FEWEST_BLOCKS = 2  # of a beginning that is not the template's
FEWEST_TOKENS = 4  # of the template's: fewer save less than a pass with a prefix costs more
REMEMBERED = 2**15  # names of which it is known how often they came
COUNTLESS = 2**16


@dataclass(frozen=True)
class Table:
    """Draws `start` to `stop` - 1 of a sequence; the sequence is None where all draws give the same."""

    sequence: Hashable
    start: int
    stop: int


@dataclass(eq=False)
class Kept:
    """A prefix under some draws, found under the name of every beginning that it serves."""

    prefix: Prefix
    table: Table
    names: tuple[bytes, ...]
    owner: object


class PrefixStore:
    """What is kept, of all adapters together: the least recently used goes first.

    Attributes:
        limit: bytes. bytes: what is held now.
        evictions: prefixes that had to make room. queried_tokens, hit_tokens: tokens of prompts, and those of them that no
            pass had to compute.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self.evictions = self.queried_tokens = self.hit_tokens = 0
        self._kept: OrderedDict[Kept, None] = OrderedDict()
        self._of: dict[tuple[bytes, Hashable], list[Kept]] = {}
        self._times: OrderedDict[bytes, int] = OrderedDict()

    def see(self, name: bytes) -> None:
        """A prompt has this beginning."""
        self._times[name] = self._times.get(name, 0) + 1
        self._times.move_to_end(name)
        if len(self._times) > REMEMBERED:
            self._times.popitem(last=False)

    def times(self, name: bytes) -> int:
        """How many prompts had it, as far as is remembered."""
        return self._times.get(name, 0)

    def holds(self, name: bytes, table: Table) -> bool:
        """Whether `find` would find it."""
        return self._covering(name, table) is not None

    def find(self, name: bytes, table: Table) -> list[Prefix] | None:
        """Prefixes that begin so, whose samples make up the table one after another; None where any is missing."""
        parts = self._covering(name, table)
        if parts is None:
            return None
        for kept, _, _ in parts:
            self._kept.move_to_end(kept)
        return [kept.prefix.samples(start, stop) for kept, start, stop in parts]

    def _covering(self, name: bytes, table: Table) -> list[tuple[Kept, int, int]] | None:
        parts, at = list[tuple[Kept, int, int]](), table.start
        while at < table.stop:
            here = [k for k in self._of.get((name, table.sequence), ()) if k.table.start <= at < k.table.stop]
            if not here:
                return None
            kept = max(here, key=lambda k: k.table.stop)
            stop = min(kept.table.stop, table.stop)
            parts.append((kept, at - kept.table.start, stop - kept.table.start))
            at = stop
        return parts

    def keep(self, kept: Kept) -> None:
        """Add a prefix, in the place of the shorter ones under the same draws that it serves as well."""
        size = kept.prefix.nbytes
        if size > self.limit:
            return
        for name in kept.names:
            for other in [k for k in self._of.get((name, kept.table.sequence), ()) if k.table == kept.table]:
                if other.names[-1] == name:
                    self._remove(other)
        while self.bytes + size > self.limit:
            self._remove(next(iter(self._kept)))
            self.evictions += 1
        self._kept[kept] = None
        self.bytes += size
        for name in kept.names:
            self._of.setdefault((name, kept.table.sequence), []).append(kept)

    def drop(self, owner: object) -> None:
        """Remove what belongs to one adapter."""
        for kept in [kept for kept in self._kept if kept.owner is owner]:
            self._remove(kept)

    def clear(self) -> None:
        """Remove everything."""
        while self._kept:
            self._remove(next(iter(self._kept)))

    def _remove(self, kept: Kept) -> None:
        del self._kept[kept]
        self.bytes -= kept.prefix.nbytes
        for name in kept.names:
            key = (name, kept.table.sequence)
            self._of[key].remove(kept)
            if not self._of[key]:
                del self._of[key]


class PrefixCache:
    """The kept prefixes of one adapter.

    Args:
        store: shared with other adapters.
        known: what the template puts before every input.

    Attributes:
        longest: tokens of the longest prompt of which anything is kept (`longest_exact`).
    """

    def __init__(self, store: PrefixStore, model: ScalaBLModel, known: Sequence[int] = ()) -> None:
        self.store, self._model, self._known = store, model, list(known)
        self._salt = os.urandom(16)  # names of two adapters differ, and none can be worked out beforehand
        self.longest = longest_exact(model)
        self._blocks, self._shared = 1, 0
        self._bytes = (0, 0)  # of a token in the shared blocks, and for each sample in the others
        if self.longest:
            self._blocks, self._shared = model.num_blocks, model.shared_blocks
            one = model.prefix([0], model.mean_draw())
            shared = sum(tensor.nbytes for layer in one.layers[: self._shared] for tensor in layer)
            self._bytes = (shared, one.nbytes - shared)

    @property
    def device(self) -> str:
        """The type of the model's."""
        return self._model.device.type

    @property
    def packs(self) -> bool:
        """Whether the model's passes leave out padding."""
        return self._model.packs

    def names(self, ids: Sequence[int]) -> dict[int, bytes]:
        """Length -> name of the beginnings of a prompt that could be kept, ascending; the last token is in none."""
        if len(ids) > self.longest:
            return {}
        found, digest = {}, self._salt
        for stop in range(BLOCK, len(ids), BLOCK):
            digest = blake2b(digest + array("q", ids[stop - BLOCK : stop]).tobytes(), digest_size=16).digest()
            found[stop] = digest
        known = len(self._known)
        if FEWEST_TOKENS <= known < len(ids) and list(ids[:known]) == self._known:
            found[known] = self._salt
        return dict(sorted(found.items()))

    def see(self, names: dict[int, bytes]) -> None:
        """A prompt with these beginnings has come."""
        for length, name in names.items():
            if length >= FEWEST_BLOCKS * BLOCK:
                self.store.see(name)

    def times(self, name: bytes) -> int:
        """How many prompts begin so, as far as is known; the template's beginning counts as countless."""
        return COUNTLESS if name == self._salt else self.store.times(name)

    def table(self, draws: Draws) -> Table | None:
        """Under which draws a prefix is kept; None for those that cannot be told from others."""
        if self._shared == self._blocks:
            return Table(None, 0, 1)
        if draws.start is None:
            return None
        return Table((draws.seed, draws.scheme), draws.start, draws.start + draws.num_samples)

    def weight(self, num_samples: int) -> float:
        """Rows that a token of an input is computed in, in the mean over all blocks."""
        return (self._shared + (self._blocks - self._shared) * num_samples) / self._blocks

    def nbytes(self, length: int, table: Table) -> int:
        """What a prefix of so many tokens takes."""
        return length * (self._bytes[0] + self._bytes[1] * (table.stop - table.start))

    def past(self, ids: Sequence[int], names: dict[int, bytes], length: int, draws: Sequence[Draws]) -> Past:
        """The beginning of these tokens under each of the different draws: kept ones, else computed and kept.

        Args:
            names: of these tokens. length: one of those in it.
        """
        parts = {}
        for wanted in draws:
            table = self.table(wanted)
            assert table is not None
            prefixes = self.store.find(names[length], table)
            parts[wanted.key] = [self._make(ids[:length], names, wanted, table)] if prefixes is None else prefixes
        return Past(parts, length)

    def _make(self, tokens: Sequence[int], names: dict[int, bytes], draws: Draws, table: Table) -> Prefix:
        own = {length: name for length, name in names.items() if length <= len(tokens)}
        start = self.stored(own, table)
        before = self.store.find(own[start], table) if start else None
        if self._shared == self._blocks:
            draws = draws.part(0, 1)
        past = Past({draws.key: before}, start) if before else None
        prefix = self._model.prefix(tokens[start:], draws, past)
        self.store.keep(Kept(prefix, table, tuple(own.values()), self))
        return prefix

    def stored(self, names: dict[int, bytes], table: Table) -> int:
        """Tokens of the longest of these beginnings that is kept under these draws, 0 for none."""
        return next((length for length in reversed(names) if self.store.holds(names[length], table)), 0)

    def clear(self) -> None:
        """Forget everything."""
        self.store.drop(self)
