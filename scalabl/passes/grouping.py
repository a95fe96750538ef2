"""Which prompts of a batch share a pass: a pass begins after one cached prefix, which all its prompts must have.

A batch whose prompts begin differently takes several passes. Each pass has a cost apart from its tokens. It is counted in
tokens too, and prompts are put into one pass or several by which makes the total smaller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scalabl.model.posterior import Draws
from scalabl.passes.prefix_cache import PrefixCache, Table

# The cost of a pass apart from its tokens. On a CPU the weights are read once, however many rows there are: about 0.08 s for
# SmolLM2-135M on 2 cores, which compute 600 of its tokens a second. Elsewhere it is the launches of kernels.
PASS_TOKENS = {"cpu": 64}
PASS_TOKENS_ELSEWHERE = 1024
EXPECTED = 0.25  # how often a prefix is expected to come again, for each time that it came again so far


@dataclass(frozen=True)
class Prompts:
    """Prompts that may share a pass.

    Attributes:
        indices: the prompts' indices in the batch.
        common: length -> name of the prefixes that all of them have and that can be cached.
        tables: the draws under which they run, each with the rows of one prompt.
        rows, tokens: of all of them; a token counts once for each row. longest: tokens of the longest prompt.
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
    """A pass: its prompts, and the `length` of the prefix that it does not compute, 0 for none.

    Attributes:
        cost: in tokens, with what has to be computed before it. reused: tokens of prompts that no pass has to compute.
    """

    prompts: Prompts
    length: int
    cost: float
    reused: int


def grouped(cache: PrefixCache, sequences: Mapping[int, Sequence[int]], draws: Mapping[int, Draws]) -> list[Group]:
    """The passes for these prompts, each prompt under its draws. The cache counts the prefixes that came."""
    groups = _merged(cache, _by_prefix(cache, _single_prompts(cache, sequences, draws)), sequences)
    cache.store.queried_tokens += sum(map(len, sequences.values()))
    cache.store.hit_tokens += sum(group.reused for group in groups)
    return groups


def _single_prompts(cache: PrefixCache, sequences: Mapping[int, Sequence[int]], draws: Mapping[int, Draws]) -> list[Prompts]:
    """Each prompt by itself."""
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
    """The prompts by the name of their longest useful prefix; the empty name for those without one.

    Done once all of them are counted, since a prefix may have come for the second time within the batch.
    """
    by_prefix: dict[bytes, Prompts] = {}
    for prompt in singles:
        name = _longest_useful(cache, prompt)
        by_prefix[name] = by_prefix[name] + prompt if name in by_prefix else prompt
    return by_prefix


def _longest_useful(cache: PrefixCache, prompt: Prompts) -> bytes:
    """The name of the longest prefix that is cached or came before; empty for none."""
    for name in reversed(prompt.common.values()):
        if cache.count(name) > 1 or all(cache.store.holds(name, table) for table in prompt.tables):
            return name
    return b""


def _merged(cache: PrefixCache, by_prefix: dict[bytes, Prompts], sequences: Mapping[int, Sequence[int]]) -> list[Group]:
    """Neighbours in one pass where that costs less than two: prompts that begin alike stand next to each other."""
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
    """Both in one pass; None where two passes cost less."""
    both = _group(cache, one.prompts + other.prompts)
    return both if both.cost < one.cost + other.cost else None


def _group(cache: PrefixCache, prompts: Prompts) -> Group:
    """The cheapest pass over these prompts: after the longest cached prefix, the longest worth caching, or none."""
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
            if start < length:  # computed in a pass of its own, which pays off each time that the prefix comes again
                again = EXPECTED * (cache.count(prompts.common[length]) - 1)
                cost += fixed + rows * (length - start) * (1 - again)
                reused -= length - start
        if cost < best.cost:
            best = Group(prompts, length, cost, reused)
    return best
