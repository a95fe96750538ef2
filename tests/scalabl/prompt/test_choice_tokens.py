"""The assignment of a token to each choice."""

from __future__ import annotations

from itertools import combinations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalabl.errors import AdapterError, PromptError
from scalabl.prompt import Prompter
from scalabl.prompt.choice_tokens import OwnTokens, spare_tokens
from tests import tiny

TAILS = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=2, max_size=6)


def prompter(*choices: str, **fields: object) -> Prompter:
    return Prompter(tiny.CLASSIFICATION.model_copy(update={"choices": choices, **fields}), tiny.tokenizer())


def old_rule(tails: list[list[int]]) -> tuple[tuple[int, ...], int] | None:
    """The rule of format version 1, written anew: (the token of each choice, the number of shared ones)."""
    for place in range(min(map(len, tails))):
        tokens = [tail[place] for tail in tails]
        if len(set(tokens)) == len(tokens):
            return tuple(tokens), place
        if len(set(tokens)) > 1:
            return None
    return None


@given(TAILS)
def test_where_the_first_difference_tells_all_choices_apart_its_tokens_are_taken(tails: list[list[int]]) -> None:
    own, expected = OwnTokens.of(tails, control=()), old_rule(tails)
    assert (own.differing is None) == (expected is None)
    if expected is not None:
        assert (own.assign(tiny.tokenizer()), len(own.shared)) == expected


def cost(own: OwnTokens, tokens: tuple[int, ...]) -> tuple[int, int]:
    """(spare tokens, the sum of the places of the others)."""
    places = [mine.index(token) if token in mine else None for token, mine in zip(tokens, own.preferred, strict=True)]
    return places.count(None), sum(place for place in places if place is not None)


@given(TAILS)
def test_no_other_assignment_costs_less(tails: list[list[int]]) -> None:
    own = OwnTokens.of(tails, control=())
    if own.differing is not None:
        return
    tokens = own.assign(tiny.tokenizer())
    assert len(set(tokens)) == len(tails)
    every = product(*([*mine, None] for mine in own.preferred))
    distinct = (chosen for chosen in every if all(a is None or a != b for a, b in combinations(chosen, 2)))
    assert cost(own, tokens) == min(
        (chosen.count(None), sum(mine.index(t) for t, mine in zip(chosen, own.preferred, strict=True) if t is not None))
        for chosen in distinct
    )


@given(st.lists(st.text(min_size=1, max_size=8), min_size=2, max_size=12, unique=True))
def test_any_labels_get_distinct_tokens_with_which_the_adapter_is_served_again(labels: list[str]) -> None:
    trained = prompter(*labels)
    assert len(set(trained.choice_tokens)) == len(labels)
    served = Prompter(trained.resolved_task, tiny.tokenizer())
    assert served.mismatched == []
    assert served.choice_tokens == trained.choice_tokens
    assert served.encode("sky") == trained.encode("sky")


@pytest.mark.parametrize(
    ("labels", "texts"),
    [
        (("New York", "New Jersey", "New Mexico", "Nevada"), ["Y", "J", "M", "v"]),
        (("atis_flight", "atis_fare", "atis_flights"), ["t", "a", "s"]),  # the last token of what another begins with
        (("0", "1", "10", "11"), ["0", "1", None, None]),  # a choice with more tokens has the spare one
        (("Yes", "yes", "no"), ["Y", "y", "n"]),
    ],
)
def test_the_best_token_is_the_first_that_tells_a_choice_apart(labels: tuple[str, ...], texts: list[str | None]) -> None:
    given_texts = prompter(*labels).token_texts
    assert [text if text in label else None for label, text in zip(labels, given_texts, strict=True)] == texts


def test_a_spare_token_is_none_of_the_special_ones_and_words_come_first() -> None:
    tokenizer = tiny.tokenizer()
    assert set(spare_tokens(tokenizer, (), ())) == set(range(3, 259))
    tokenizer.add_tokens(["apple", "<tool>"])
    assert next(spare_tokens(tokenizer, (), ())) < 259, "an added token is not text"


def test_as_many_choices_as_the_vocabulary_has_tokens_and_one_more() -> None:
    most = [f"label {n}" for n in range(256)]
    assert len(set(prompter(*most).choice_tokens)) == 256
    with pytest.raises(PromptError, match=r"257 choices need as many tokens, and .* has only 256 that can stand for them"):
        prompter(*most, "label 256")


@pytest.mark.parametrize("labels", [("red", "rose", "rust"), ("0", "1", "10", "11")])
def test_a_token_that_cannot_stand_for_its_choice_is_refused(labels: tuple[str, ...]) -> None:
    right = prompter(*labels).choice_tokens
    for place in range(len(labels)):
        wrong = prompter(*labels, choice_tokens=tuple(258 if i == place else t for i, t in enumerate(right)))
        with pytest.raises(AdapterError, match=f"another token for the choice {labels[place]!r}"):
            wrong.check_tokenizer("base")


def test_another_own_token_is_taken_from_the_config() -> None:
    tokens = tuple(tiny.tokenizer()("dstl", add_special_tokens=False)["input_ids"])
    served = prompter("red", "rose", "rust", "blue", choice_tokens=tokens)
    assert served.choice_tokens == tokens
    assert served.mismatched == []
