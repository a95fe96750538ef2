"""Which token stands for each choice. How choices become tokens is in `prompter`.

If the choices begin alike and then differ in their next token, that token stands for each. Otherwise every choice gets one
of its own tokens by assignment, so that all are distinct, and a spare token if none is left for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import min_weight_full_bipartite_matching
from transformers import PreTrainedTokenizerBase

from scalabl.errors import PromptError


@dataclass(frozen=True)
class OwnTokens:
    """The tokens that can stand for each choice.

    Attributes:
        shared: the tokens that all choices begin with; they become a part of every prompt.
        differing: the token after them of each choice, if these are distinct; None if they are not.
        preferred: for each choice its own tokens after the shared ones, the best first, none twice.
        lengths: the number of tokens of each choice.
    """

    shared: tuple[int, ...]
    differing: tuple[int, ...] | None
    preferred: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, tails: Sequence[Sequence[int]], control: Container[int]) -> OwnTokens:
        """The own tokens of choices that are tokenised as `tails`.

        The best token of a choice is the first one that tells it apart from every other choice, given the tokens before it.
        Then come those after it, then those before it, the nearest first. Of a choice with which another one begins, the
        last token is the best.

        Args:
            control: ids of special tokens, which stand for no choice unless it begins with one.
        """
        lengths = tuple(map(len, tails))
        common = 0
        while all(len(tail) > common for tail in tails) and len({tail[common] for tail in tails}) == 1:
            common += 1
        shortest = min(lengths)
        if shortest > common and len({tail[common] for tail in tails}) == len(tails):
            differing = tuple(tail[common] for tail in tails)
            return cls(tuple(tails[0][:common]), differing, tuple((token,) for token in differing), lengths)
        common = min(common, max(shortest - 1, 0))  # a token is left for each choice
        rests = [tail[common:] for tail in tails]
        preferred = tuple(
            tuple(dict.fromkeys(token for token in (*rest[place:], *reversed(rest[:place])) if token not in control))
            for rest, place in zip(rests, _places_that_tell_apart(rests), strict=True)
        )
        return cls(tuple(tails[0][:common]), None, preferred, lengths)

    def assign(self, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        """One token for each choice, all distinct: those that differ, or an assignment of minimum total cost.

        A choice's own token costs its place in `preferred`. A spare token costs more than all of these together, so as few
        choices as possible have one; of equal ones it is the longer choice.

        Raises:
            PromptError: the tokenizer has fewer tokens than there are choices.
        """
        if self.differing is not None:
            return self.differing
        column_of = {token: column for column, token in enumerate(dict.fromkeys(t for own in self.preferred for t in own))}
        count, columns = len(self.preferred), len(column_of)
        dear = 1.0 + sum(map(len, self.preferred))
        rows: list[int] = []
        places: list[int] = []
        costs: list[float] = []
        for row, (own, length) in enumerate(zip(self.preferred, self.lengths, strict=True)):
            # The choice's column after those of the tokens stands for "a spare token". A cost of 0 would mean "no edge".
            rows += [row] * (len(own) + 1)
            places += [column_of[token] for token in own] + [columns + row]
            costs += [1.0 + place for place in range(len(own))] + [dear + 1 / (1 + length)]
        edges = csr_array((np.array(costs), (np.array(rows), np.array(places))), shape=(count, columns + count))
        _, chosen = min_weight_full_bipartite_matching(edges)
        tokens = list(column_of)
        assigned = [tokens[column] if column < columns else None for column in chosen.tolist()]
        spare = self._spare(assigned, tokenizer)
        return tuple(next(spare) if token is None else token for token in assigned)

    def mismatched(self, tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The choices (by index) for which a token of `tokens` cannot stand with this tokenizer."""
        if self.differing is not None:
            return [index for index, pair in enumerate(zip(tokens, self.differing, strict=True)) if pair[0] != pair[1]]
        assigned = [token if token in own else None for token, own in zip(tokens, self.preferred, strict=True)]
        if None not in assigned:
            return []
        try:
            spare = list(self._spare(assigned, tokenizer))
        except PromptError:
            spare = []
        others = [index for index, token in enumerate(assigned) if token is None]
        return [index for place, index in enumerate(others) if spare[place : place + 1] != [tokens[index]]]

    def _spare(self, assigned: Sequence[int | None], tokenizer: PreTrainedTokenizerBase) -> Iterator[int]:
        """A spare token for each choice without one, in their order."""
        needed = assigned.count(None)
        taken = {token for token in assigned if token is not None}
        own = {token for tokens in self.preferred for token in tokens} | set(self.shared)
        spare = list(islice(spare_tokens(tokenizer, taken, own), needed)) if needed else []
        if len(spare) < needed:
            raise PromptError(
                f"{len(assigned)} choices need as many tokens, and this base model's tokenizer has only "
                f"{len(assigned) - needed + len(spare)} that can stand for them; use fewer choices or another base model"
            )
        return iter(spare)


def _places_that_tell_apart(tails: Sequence[Sequence[int]]) -> list[int]:
    """For each choice the place of the first token up to which no other choice is the same, else of its last token."""
    node_of: dict[tuple[int, int], int] = {}  # a tree of all beginnings: (beginning, next token) -> the longer beginning
    passing: Counter[int] = Counter()
    paths = []
    for tail in tails:
        node, path = 0, []
        for token in tail:
            node = node_of.setdefault((node, token), len(node_of) + 1)
            path.append(node)
        passing.update(path)
        paths.append(path)
    return [next((place for place, node in enumerate(path) if passing[node] == 1), max(len(path) - 1, 0)) for path in paths]


def spare_tokens(tokenizer: PreTrainedTokenizerBase, taken: Container[int], own: Container[int]) -> Iterator[int]:
    """Tokens that stand for no choice yet: common words first, then other visible tokens, then the rest.

    A word has three letters at least, since single letters and digits often have a meaning among labels (grades, codes).

    In each group the tokens of no choice come before those of other choices, and both are in the vocabulary's order.

    Args:
        taken: tokens that stand for a choice, which are left out.
        own: the tokens of all choices.
    """
    control = control_ids(tokenizer)
    vocabulary = [token for token in sorted(set(tokenizer.get_vocab().values())) if token not in control]

    def kind(token: int) -> int:
        text = str(tokenizer.decode([token])).strip()
        if len(text) >= 3 and text.isalpha():
            return 0
        return 1 if text and text.isprintable() and "�" not in text else 2

    later: tuple[list[int], ...] = ([], [], [], [], [])
    for token in vocabulary:
        if token in taken:
            continue
        place = kind(token) + 3 * (token in own)
        if place == 0:
            yield token
        else:
            later[place - 1].append(token)
    for tokens in later:
        yield from tokens


def control_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of special and added tokens, which are not text."""
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
