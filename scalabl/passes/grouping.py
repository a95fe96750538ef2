"""Groups the prompts of a batch into passes. A pass begins after one cached prefix, which all its prompts must share.

Prompts that begin differently may need several passes. Each pass has a fixed cost besides its tokens. It is expressed in
tokens as well, and prompts share a pass if that makes the total cost smaller. Prefixes are stored in `prefix_cache`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scalabl.model.posterior import Draws
from scalabl.passes.prefix_cache import PrefixCache, Table

# The fixed cost of a pass, in tokens. On a CPU it is reading the weights once, however many rows there are: about 0.08 s for
# SmolLM2-135M on 2 cores, which compute 600 of its tokens a second. On other devices it is launching the kernels.
PASS_TOKENS = {"cpu": 64}
PASS_TOKENS_ELSEWHERE = 1024
EXPECTED = 0.25  # expected further uses of a prefix, for each time that it was used again so far


@dataclass(frozen=True)
class Prompts:
    """Prompts that may share a pass.

    Attributes:
        indices: the prompts' indices in the batch.
        common: length -> name of each cacheable prefix that all prompts share.
        tables: the draws under which the prompts run -> rows of one prompt.
        rows, tokens: totals over all prompts; a token counts once for each row.
        longest: tokens of the longest prompt.
    """

    indices: tuple[int, ...]
    common: dict[int, bytes]
    tables: dict[Table, float]
    rows: float
    tokens: float
    longest: int

    def __add__(self, other: Prompts) -> Prompts:
        return Prompts(
            self.indices + other.indices,
            {length: name for length, name in self.common.items() if other.common.get(length) == name},
            self.tables | other.tables,
            self.rows + other.rows,
            self.tokens + other.tokens,
            max(self.longest, other.longest),
        )


@dataclass(frozen=True)
class Group:
    """A planned pass: its prompts, and the `length` of the shared prefix that it does not compute, 0 for none.

    Attributes:
        cost: in tokens, including the computation of a prefix that is not cached yet.
        reused: tokens of the prompts that no pass has to compute.
    """

    prompts: Prompts
    length: int
    cost: float
    reused: int


def grouped(cache: PrefixCache, sequences: Mapping[int, Sequence[int]], draws: Mapping[int, Draws]) -> list[Group]:
    """Plan the passes for these prompts, each under its draws. Updates the cache's counts of prefixes and tokens."""
    groups = _merged(cache, _by_prefix(cache, _single_prompts(cache, sequences, draws)), sequences)
    cache.store.queried_tokens += sum(map(len, sequences.values()))
    cache.store.hit_tokens += sum(group.reused for group in groups)
    return groups


def _single_prompts(cache: PrefixCache, sequences: Mapping[int, Sequence[int]], draws: Mapping[int, Draws]) -> list[Prompts]:
    """A `Prompts` for each prompt alone."""
    singles = []
    for index, ids in sequences.items():
        table = cache.table(draws[index])
        names = {} if table is None else cache.names(ids)
        weight = cache.weight(draws[index].num_samples)
        cache.see(names)
        tables = {} if table is None else {table: weight}
        singles.append(Prompts((index,), names, tables, weight, weight * len(ids), len(ids)))
    return singles


def _by_prefix(cache: PrefixCache, singles: Sequence[Prompts]) -> dict[bytes, Prompts]:
    """Group prompts by the name of their longest useful prefix; the empty name is for prompts without one.

    All prompts of the batch must be counted before, since a prefix may occur for the second time within the batch.
    """
    by_prefix: dict[bytes, Prompts] = {}
    for prompt in singles:
        name = _longest_useful(cache, prompt)
        by_prefix[name] = by_prefix[name] + prompt if name in by_prefix else prompt
    return by_prefix


def _longest_useful(cache: PrefixCache, prompt: Prompts) -> bytes:
    """The name of the longest prefix that is cached or occurred before; empty for none."""
    for name in reversed(prompt.common.values()):
        if cache.count(name) > 1 or all(cache.store.holds(name, table) for table in prompt.tables):
            return name
    return b""


def _merged(cache: PrefixCache, by_prefix: dict[bytes, Prompts], sequences: Mapping[int, Sequence[int]]) -> list[Group]:
    """Merge groups whose prompts begin alike, if one pass costs less than two. Sorting puts such groups side by side."""
    rest = _group(cache, by_prefix.pop(b"")) if b"" in by_prefix else None
    neighbours: list[Group] = []
    for prompts in sorted(by_prefix.values(), key=lambda prompts: list(sequences[prompts.indices[0]])):
        group = _group(cache, prompts)
        while neighbours and (both := _cheaper_together(cache, neighbours[-1], group)):
            neighbours.pop()
            group = both
        neighbours.append(group)
    groups = []
    for group in sorted(neighbours, key=lambda group: group.length):
        both = _cheaper_together(cache, rest, group) if rest else None
        if both or (rest is None and not group.length):
            rest = both or group
        else:
            groups.append(group)
    return groups + ([rest] if rest else [])


def _cheaper_together(cache: PrefixCache, one: Group, other: Group) -> Group | None:
    """Both groups in one pass; None if two passes cost less."""
    both = _group(cache, one.prompts + other.prompts)
    return both if both.cost < one.cost + other.cost else None


def _group(cache: PrefixCache, prompts: Prompts) -> Group:
    """The cheapest pass over these prompts: after the longest cached prefix, after the longest worth caching, or whole."""
    fixed = PASS_TOKENS.get(cache.device, PASS_TOKENS_ELSEWHERE)
    whole = fixed + (prompts.tokens if cache.packs else prompts.rows * prompts.longest)
    best = Group(prompts, 0, whole, 0)
    candidates = {}
    for length, name in prompts.common.items():
        if all(cache.store.holds(name, table) for table in prompts.tables):
            candidates["cached"] = length
        if cache.count(name) > 1 and sum(cache.nbytes(length, table) for table in prompts.tables) <= cache.store.limit:
            candidates["worth caching"] = length
    for length in candidates.values():
        cost, reused = whole - prompts.rows * length, len(prompts.indices) * length
        for table, rows in prompts.tables.items():
            start = cache.cached_tokens({n: name for n, name in prompts.common.items() if n <= length}, table)
            if start < length:  # it takes a pass of its own, which pays off whenever the prefix is used again
                further_uses = EXPECTED * (cache.count(prompts.common[length]) - 1)
                cost += fixed + rows * (length - start) * (1 - further_uses)
                reused -= length - start
        if cost < best.cost:
            best = Group(prompts, length, cost, reused)
    return best
