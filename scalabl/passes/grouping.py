"""Which prompts of a batch share a pass over what is left of them, after a beginning that they have in common.

A pass has one beginning for all its prompts, so a batch of several kinds takes several passes. What a pass costs apart from
its tokens is counted in tokens, and prompts are put together or apart by which makes the sum smaller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scalabl.model.posterior import Draws
from scalabl.passes.prefix_cache import PrefixCache, Table

# What a pass costs beyond its tokens. On a CPU the weights are read once, however many rows there are: about 0.08 s for
# SmolLM2-135M on 2 cores, which compute 600 of its tokens a second. Elsewhere it is the launches of kernels.
PASS_TOKENS = {"cpu": 64}
PASS_TOKENS_ELSEWHERE = 1024
EXPECTED = 0.25  # how often a beginning will come again, for each time that it came again so far


@dataclass(frozen=True)
class Prompts:
    """Prompts that may share a pass.

    Attributes:
        indices: what they are called by.
        common: length -> name of the beginnings that they have in common and that can be kept.
        tables: under which draws they run, each with the rows of one prompt.
        rows, tokens: of all of them, the tokens of every row; `longest`: of one prompt.
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
    """A pass: its prompts, and the `length` of the beginning that it does not compute, 0 for none.

    Attributes:
        cost: in tokens, with what has to be made beforehand. reused: tokens of prompts that nothing has to compute.
    """

    prompts: Prompts
    length: int
    cost: float
    reused: int


def grouped(cache: PrefixCache, sequences: Mapping[int, Sequence[int]], draws: Mapping[int, Draws]) -> list[Group]:
    """The passes for these prompts, each under its draws; the cache hears which beginnings came."""
    each = []
    for index, ids in sequences.items():
        table = cache.table(draws[index])
        names = {} if table is None else cache.names(ids)
        weight = cache.weight(draws[index].num_samples)
        cache.see(names)
        tables = {} if table is None else {table: weight}
        each.append(Prompts((index,), names, tables, weight, weight * len(ids), len(ids)))
    alike: dict[bytes, Prompts] = {}
    for prompt in each:  # only now, since a beginning may have come for the second time within the batch
        name = _longest(cache, prompt)
        alike[name] = alike[name] + prompt if name in alike else prompt
    rest = _group(cache, alike.pop(b"")) if b"" in alike else None
    groups: list[Group] = []
    for prompts in sorted(
        alike.values(), key=lambda prompts: list(sequences[prompts.indices[0]])
    ):  # what begins alike is near
        group = _group(cache, prompts)
        while groups and (both := _joined(cache, groups[-1], group)):
            groups.pop()
            group = both
        groups.append(group)
    found = []
    for group in sorted(groups, key=lambda group: group.length):
        both = _joined(cache, rest, group) if rest else None
        if both or (rest is None and not group.length):
            rest = both or group
        else:
            found.append(group)
    found += [rest] if rest else []
    cache.store.queried_tokens += sum(map(len, sequences.values()))
    cache.store.hit_tokens += sum(group.reused for group in found)
    return found


def _longest(cache: PrefixCache, prompt: Prompts) -> bytes:
    """The name of the longest beginning that is kept or may be worth it, empty for none."""
    for name in reversed(prompt.common.values()):
        if cache.times(name) > 1 or all(cache.store.holds(name, table) for table in prompt.tables):
            return name
    return b""


def _joined(cache: PrefixCache, one: Group, other: Group) -> Group | None:
    """Both in one pass, where that costs less than two."""
    both = _group(cache, one.prompts + other.prompts)
    return both if both.cost < one.cost + other.cost else None


def _group(cache: PrefixCache, prompts: Prompts) -> Group:
    """A pass over these prompts after what makes it cheapest: the longest kept beginning, the longest worth it or none."""
    fixed = PASS_TOKENS.get(cache.device, PASS_TOKENS_ELSEWHERE)
    whole = fixed + (prompts.tokens if cache.packs else prompts.rows * prompts.longest)
    best = Group(prompts, 0, whole, 0)
    lengths = {}
    for length, name in prompts.common.items():
        if all(cache.store.holds(name, table) for table in prompts.tables):
            lengths["kept"] = length
        if cache.times(name) > 1 and sum(cache.nbytes(length, table) for table in prompts.tables) <= cache.store.limit:
            lengths["worth it"] = length
    for length in lengths.values():
        cost, reused = whole - prompts.rows * length, len(prompts.indices) * length
        for table, rows in prompts.tables.items():
            start = cache.stored({n: name for n, name in prompts.common.items() if n <= length}, table)
            if start < length:  # made in a pass of its own, and expected to save as much as often as it comes again
                again = EXPECTED * (cache.times(prompts.common[length]) - 1)
                cost += fixed + rows * (length - start) * (1 - again)
                reused -= length - start
        if cost < best.cost:
            best = Group(prompts, length, cost, reused)
    return best
