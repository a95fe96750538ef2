"""The prefix cache: stores keys and values of prefixes that prompts share, up to a limit of bytes, and looks them up.

A prefix is named by the chained hash of its blocks of tokens, as in vLLM. It is cached when a second prompt begins with it,
or at once if it is the template's own text, so that a stream of different prompts stores nothing. A cached prefix can be
used as any shorter prefix of itself. Which prompts of a batch share a pass after a prefix is decided in `grouping`; whether
caching is exact for a base model is tested in `prefix`.
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
FEWEST_BLOCKS = 2  # the shortest cached prefix, unless it is the template's
FEWEST_TOKENS = 4  # the shortest cached template text: a shorter one saves less than it costs
REMEMBERED = 2**15  # prefixes whose number of prompts is counted
COUNTLESS = 2**16  # the count of the template's own prefix: more than any counted one


@dataclass(frozen=True)
class Table:
    """Draws `start` to `stop` - 1 of a sequence; the sequence is None if the prefix is the same under all draws."""

    sequence: Hashable
    start: int
    stop: int


@dataclass(eq=False)
class CachedPrefix:
    """A prefix under some draws.

    Attributes:
        names: the names of the prefix and of each shorter prefix that it contains, the longest last.
        owner: the adapter's `PrefixCache`.
    """

    prefix: Prefix
    table: Table
    names: tuple[bytes, ...]
    owner: object


class PrefixStore:
    """The cached prefixes of all adapters together; the least recently used one is removed first.

    Attributes:
        limit: the most bytes to use.
        bytes: the bytes in use now.
        evictions: the number of prefixes that were removed to make room.
        queried_tokens, hit_tokens: tokens of all prompts, and those of them that no pass had to compute.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self.evictions = self.queried_tokens = self.hit_tokens = 0
        self._entries: OrderedDict[CachedPrefix, None] = OrderedDict()
        self._by_name: dict[tuple[bytes, Hashable], list[CachedPrefix]] = {}
        self._counts: OrderedDict[bytes, int] = OrderedDict()

    def see(self, name: bytes) -> None:
        """Count a prompt that begins with this prefix."""
        self._counts[name] = self._counts.get(name, 0) + 1
        self._counts.move_to_end(name)
        if len(self._counts) > REMEMBERED:
            self._counts.popitem(last=False)

    def count(self, name: bytes) -> int:
        """How many prompts began with this prefix; rarely used prefixes are forgotten."""
        return self._counts.get(name, 0)

    def holds(self, name: bytes, table: Table) -> bool:
        """Whether `find` would return prefixes for these draws."""
        return self._covering(name, table) is not None

    def find(self, name: bytes, table: Table) -> list[Prefix] | None:
        """Prefixes of this name whose samples, concatenated, are those of the table; None if any sample is missing."""
        parts = self._covering(name, table)
        if parts is None:
            return None
        for entry, _, _ in parts:
            self._entries.move_to_end(entry)
        return [entry.prefix.samples(start, stop) for entry, start, stop in parts]

    def _covering(self, name: bytes, table: Table) -> list[tuple[CachedPrefix, int, int]] | None:
        """(cached prefix, first sample, end) of parts that together are the table's samples; None if any is missing."""
        parts, position = list[tuple[CachedPrefix, int, int]](), table.start
        while position < table.stop:
            same_name = self._by_name.get((name, table.sequence), ())
            entries = [entry for entry in same_name if entry.table.start <= position < entry.table.stop]
            if not entries:
                return None
            entry = max(entries, key=lambda entry: entry.table.stop)
            stop = min(entry.table.stop, table.stop)
            parts.append((entry, position - entry.table.start, stop - entry.table.start))
            position = stop
        return parts

    def add(self, entry: CachedPrefix) -> None:
        """Store a prefix, and remove stored prefixes of it under the same draws, which it replaces."""
        size = entry.prefix.nbytes
        if size > self.limit:
            return
        for name in entry.names:
            for other in list(self._by_name.get((name, entry.table.sequence), ())):
                if other.table == entry.table and other.names[-1] == name:
                    self._remove(other)
        while self.bytes + size > self.limit:
            self._remove(next(iter(self._entries)))
            self.evictions += 1
        self._entries[entry] = None
        self.bytes += size
        for name in entry.names:
            self._by_name.setdefault((name, entry.table.sequence), []).append(entry)

    def drop(self, owner: object) -> None:
        """Remove all prefixes of one adapter."""
        for entry in [entry for entry in self._entries if entry.owner is owner]:
            self._remove(entry)

    def clear(self) -> None:
        """Remove everything."""
        while self._entries:
            self._remove(next(iter(self._entries)))

    def _remove(self, entry: CachedPrefix) -> None:
        del self._entries[entry]
        self.bytes -= entry.prefix.nbytes
        for name in entry.names:
            key = (name, entry.table.sequence)
            self._by_name[key].remove(entry)
            if not self._by_name[key]:
                del self._by_name[key]


class PrefixCache:
    """The cached prefixes of one adapter.

    Args:
        store: shared with other adapters.
        opening: the tokens that the template puts before every input.

    Attributes:
        longest: the most tokens of a prompt whose prefixes are cached (`longest_exact`); 0 if none are.
    """

    def __init__(self, store: PrefixStore, model: ScalaBLModel, opening: Sequence[int] = ()) -> None:
        self.store, self._model, self._opening = store, model, list(opening)
        self._salt = os.urandom(16)  # so that names differ between adapters and cannot be predicted
        self.longest = longest_exact(model)
        self._blocks, self._shared = 1, 0
        self._bytes = (0, 0)  # bytes of a token: in the shared blocks; for each sample in the others
        if self.longest:
            self._blocks, self._shared = model.num_blocks, model.shared_blocks
            one = model.prefix([0], model.mean_draw())
            shared = sum(tensor.nbytes for layer in one.layers[: self._shared] for tensor in layer)
            self._bytes = (shared, (one.nbytes - shared) // model.members)

    @property
    def device(self) -> str:
        """The type of the model's device."""
        return self._model.device.type

    @property
    def packs(self) -> bool:
        """Whether the model runs packed passes, without padding."""
        return self._model.packs

    def names(self, ids: Sequence[int]) -> dict[int, bytes]:
        """Length -> name of each cacheable prefix of a prompt, ascending; none includes the prompt's last token."""
        if len(ids) > self.longest:
            return {}
        names, digest = {}, self._salt
        for stop in range(BLOCK, len(ids), BLOCK):
            digest = blake2b(digest + array("q", ids[stop - BLOCK : stop]).tobytes(), digest_size=16).digest()
            names[stop] = digest
        opening = len(self._opening)
        if FEWEST_TOKENS <= opening < len(ids) and list(ids[:opening]) == self._opening:
            names[opening] = self._salt
        return dict(sorted(names.items()))

    def see(self, names: dict[int, bytes]) -> None:
        """Count a prompt with these prefixes."""
        for length, name in names.items():
            if length >= FEWEST_BLOCKS * BLOCK:
                self.store.see(name)

    def count(self, name: bytes) -> int:
        """How many prompts had this prefix; `COUNTLESS` for the template's own."""
        return COUNTLESS if name == self._salt else self.store.count(name)

    def table(self, draws: Draws) -> Table | None:
        """The draws under which a prefix is cached; None for draws that are not part of a seed's sequence."""
        if self._shared == self._blocks:
            return Table(None, 0, 1)
        if draws.start is None:
            return None
        return Table((draws.seed, draws.scheme), draws.start, draws.start + draws.num_samples)

    def weight(self, num_samples: int) -> float:
        """How many rows compute each token of an input, averaged over all decoder blocks."""
        return (self._shared + (self._blocks - self._shared) * num_samples) / self._blocks

    def nbytes(self, length: int, table: Table) -> int:
        """The size in bytes of a prefix of this many tokens."""
        return length * (self._bytes[0] + self._bytes[1] * (table.stop - table.start))

    def past(self, ids: Sequence[int], names: dict[int, bytes], length: int, draws: Sequence[Draws]) -> Past:
        """The prefix of the first `length` tokens under each of the draws: from the cache, or else computed and stored.

        Args:
            names: the tokens' cacheable prefixes (`names`); `length` must be one of their lengths.
            draws: must all be different.
        """
        parts = {}
        for wanted in draws:
            table = self.table(wanted)
            assert table is not None  # for other draws `grouping` plans no prefix
            prefixes = self.store.find(names[length], table)
            parts[wanted.key] = [self._compute(ids[:length], names, wanted, table)] if prefixes is None else prefixes
        return Past(parts, length)

    def _compute(self, tokens: Sequence[int], names: dict[int, bytes], draws: Draws, table: Table) -> Prefix:
        """Compute a prefix, starting from the longest cached part of it, and store it."""
        own = {length: name for length, name in names.items() if length <= len(tokens)}
        start = self.cached_tokens(own, table)
        before = self.store.find(own[start], table) if start else None
        if self._shared == self._blocks:
            draws = draws.part(0, 1)
        past = Past({draws.key: before}, start) if before else None
        prefix = self._model.prefix(tokens[start:], draws, past)
        self.store.add(CachedPrefix(prefix, table, tuple(own.values()), self))
        return prefix

    def cached_tokens(self, names: dict[int, bytes], table: Table) -> int:
        """The length of the longest of these prefixes that is cached under these draws; 0 for none."""
        return next((length for length in reversed(names) if self.store.holds(names[length], table)), 0)

    def clear(self) -> None:
        """Remove everything that is cached for this adapter."""
        self.store.drop(self)
