"""What is kept of prompts' beginnings, for how long, and which prompts share a pass: with the numbers of passes without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from scalabl.model.posterior import Draws
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.model.token_batch import TokenBatch
from scalabl.passes import grouping
from scalabl.passes.grouping import grouped
from scalabl.passes.prefix_cache import BLOCK, PrefixCache, PrefixStore
from scalabl.passes.probes import find_shared_work
from scalabl.passes.rounds import Rounds
from tests import tiny

LONG, OTHER, *TAILS = tiny.ragged((100, 70, 3, 9, 1, 14, 20))


@pytest.fixture(autouse=True)
def _passes_cost_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few prompts are enough to make up for them."""
    monkeypatch.setitem(grouping.PASS_TOKENS, "cpu", 4)


def _cached(limit: int = 2**24, known: Sequence[int] = (), **changes: Any) -> tuple[ScalaBLModel, PrefixCache]:
    model = tiny.adapted(**changes)
    find_shared_work(model)
    return model, PrefixCache(PrefixStore(limit), model, known)


def _run(
    model: ScalaBLModel, cache: PrefixCache, prompts: Mapping[int, Sequence[int]], draws: Draws | Mapping[int, Draws]
) -> None:
    """One round, whose numbers are those of a pass over all prompts from their first tokens."""
    each = dict.fromkeys(prompts, draws) if isinstance(draws, Draws) else dict(draws)
    found = Rounds(model, prompts, each, cache, keeps_trunk=False).readings(each)
    expected = model.readings(TokenBatch.of(list(prompts.values())), list(each.values()))
    for one, other in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(one.logits, other.logits, rtol=0, atol=1e-5)
        torch.testing.assert_close(one.state, other.state, rtol=0, atol=1e-4)


def _counts(cache: PrefixCache) -> tuple[int, int]:
    """(tokens not computed, tokens asked for) since the last look."""
    found = cache.store.hit_tokens, cache.store.queried_tokens
    cache.store.hit_tokens = cache.store.queried_tokens = 0
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"layers_to_transform": (1,)},
        {"target_modules": ("lm_head",)},
        {"name": "gpt2"},
        {"name": "gemma3"},
        tiny.MIXTURE,
        tiny.MIXTURE | {"target_modules": ("lm_head",)},
    ],
    ids=str,
)
def test_shared_unshared_and_mixed_prompts_get_their_own_numbers(changes: dict[str, Any]) -> None:
    model, cache = _cached(**changes)
    draws = [model.draws(8), model.draws(3, seed=1), model.draws(8), model.draws(model.members)]
    shared = [LONG + tail for tail in TAILS]
    mixed = [LONG + TAILS[0], OTHER, OTHER + TAILS[1], LONG[:40] + TAILS[2], TAILS[3], LONG[:97], LONG[:96], [5]]
    for prompts in (shared, mixed, [[*LONG[:96], 7]], mixed[::-1]):
        batch = dict(enumerate(prompts))
        _run(model, cache, batch, draws[0])
        _run(model, cache, batch, {index: draws[index % 4] for index in batch})
    hit, queried = _counts(cache)
    assert 0.3 < hit / queried < 1


def test_the_second_prompt_with_a_beginning_makes_it_and_the_third_finds_it() -> None:
    model, cache = _cached()
    draws, hits = model.draws(8), []
    for tail in TAILS[:4]:
        _run(model, cache, {0: LONG + tail}, draws)
        hits.append((_counts(cache)[0], cache.store.bytes))
    each = 8 * 2 * 2 * 2 * 8 * 4  # samples, blocks, keys and values, heads, numbers, bytes
    assert hits == [(0, 0), (0, 96 * each), (96, 96 * each), (96, 96 * each)]


def test_within_a_batch_one_prompt_makes_it_for_the_others() -> None:
    model, cache = _cached()
    _run(model, cache, dict(enumerate(LONG + tail for tail in TAILS)), model.draws(8))
    assert _counts(cache) == (96 * (len(TAILS) - 1), 100 * len(TAILS) + sum(map(len, TAILS)))


def test_the_last_token_is_always_computed() -> None:
    model, cache = _cached()
    for _ in range(3):
        _run(model, cache, {0: LONG[: 2 * BLOCK + 1], 1: LONG[: 2 * BLOCK]}, model.draws(8))
    assert _counts(cache)[0] > 0
    assert list(cache.names(LONG[: 2 * BLOCK])) == [BLOCK]


def test_a_template_s_beginning_is_kept_from_the_first_prompt_on() -> None:
    model, cache = _cached(known=LONG[:21])
    for tail in TAILS[:3]:
        _run(model, cache, {0: LONG[:21] + tail}, model.draws(8))
    assert _counts(cache)[0] == 2 * 21
    _run(model, cache, {0: [*LONG[:20], 4, *TAILS[0]]}, model.draws(8))  # one token is another
    assert _counts(cache)[0] == BLOCK  # of the same entry


def _fresh(first: int) -> dict[int, list[int]]:
    """Prompts that go on alike only up to the end of what is long."""
    return dict(enumerate([*LONG, first, *tail] for tail in TAILS))


def test_samples_of_one_sequence_serve_any_number_of_them() -> None:
    model, cache = _cached()
    most = model.draws(64)
    _run(model, cache, _fresh(10), model.draws(8))
    size = cache.store.bytes
    for first, part in enumerate((most.part(0, 8), most.part(2, 5), model.draws(4))):
        _run(model, cache, _fresh(11 + first), part)
        assert cache.store.bytes == size
    _run(model, cache, _fresh(20), most.part(8, 24))
    assert cache.store.bytes == 3 * size
    _run(model, cache, _fresh(21), model.draws(24))
    assert cache.store.bytes == 3 * size
    _run(model, cache, _fresh(22), model.draws(8, seed=9))
    assert cache.store.bytes == 4 * size


def test_what_only_the_head_makes_random_is_kept_once_for_all_draws() -> None:
    model, cache = _cached(target_modules=("lm_head",))
    for first, draws in ((2, model.draws(8)), (3, model.draws(64, seed=3)), (4, model.mean_draw())):
        _run(model, cache, _fresh(first), draws)
    assert cache.store.bytes == 96 * 2 * 2 * 2 * 8 * 4


def test_draws_that_are_of_no_sequence_keep_nothing() -> None:
    model, cache = _cached()
    for _ in range(3):
        _run(model, cache, {0: LONG, 1: LONG + TAILS[0]}, model.mean_draw())
    assert (cache.store.bytes, _counts(cache)[0]) == (0, 0)


def test_a_stream_of_ever_new_prompts_stores_nothing() -> None:
    model, cache = _cached(limit=2**18)
    draws = model.draws(8)
    for seed in range(8):
        _run(model, cache, dict(enumerate(tiny.ragged((80, 90, 40), seed=seed + 1))), draws)
    assert (cache.store.bytes, cache.store.evictions) == (0, 0)


def test_a_stream_of_ever_new_beginnings_stays_within_its_bound_and_what_is_used_stays() -> None:
    model, cache = _cached(limit=2**18)
    draws = model.draws(8)
    for seed in range(6):
        (beginning,) = tiny.ragged((80,), seed=seed + 1)
        _run(model, cache, dict(enumerate([beginning + tail for tail in TAILS] + [LONG + TAILS[0]])), draws)
        assert cache.store.bytes <= 2**18
    assert cache.store.evictions >= 3
    _counts(cache)
    _run(model, cache, {0: LONG + TAILS[1]}, draws)
    assert _counts(cache)[0] == 96


def test_what_is_larger_than_the_bound_is_not_kept() -> None:
    model, cache = _cached(limit=10_000)
    for _ in range(3):
        _run(model, cache, dict(enumerate(LONG + tail for tail in TAILS)), model.draws(8))
    assert (cache.store.bytes, cache.store.evictions, _counts(cache)[0]) == (0, 0, 0)


def test_a_longer_beginning_takes_the_place_of_the_shorter() -> None:
    model, cache = _cached()
    draws = model.draws(8)
    _run(model, cache, dict(enumerate(LONG[:50] + tail for tail in TAILS)), draws)
    short = cache.store.bytes
    _run(model, cache, dict(enumerate(LONG + tail for tail in TAILS)), draws)
    assert (short, cache.store.bytes) == (48 * 2048, 96 * 2048)
    _counts(cache)
    _run(model, cache, {0: LONG[:50] + TAILS[0]}, draws)
    assert _counts(cache)[0] == 48


def test_adapters_share_the_bound_and_nothing_else() -> None:
    model, cache = _cached(limit=2**18)
    other_model = tiny.adapted(seed=1)
    find_shared_work(other_model)
    other = PrefixCache(cache.store, other_model)
    prompts = dict(enumerate(LONG + tail for tail in TAILS))
    _run(model, cache, prompts, model.draws(8))
    _run(other_model, other, prompts, other_model.draws(8))
    assert cache.store.bytes == 96 * 2048
    assert cache.store.evictions == 1
    other.clear()
    assert (cache.store.bytes, cache.store.evictions) == (0, 1)


def test_the_first_round_fixes_the_passes_of_the_others() -> None:
    model, cache = _cached(layers_to_transform=(1,))
    whole = model.draws(16, seed=2)
    prompts = dict(enumerate([*(LONG + tail for tail in TAILS), OTHER]))
    rounds = Rounds(model, prompts, dict.fromkeys(prompts, whole.part(0, 2)), cache, keeps_trunk=True)
    for going, start, stop in ((list(prompts), 0, 2), ([1, 3, 5], 2, 4), ([5, 2], 4, 16), ([0], 4, 8)):
        part = whole.part(start, stop)
        found = rounds.readings(dict.fromkeys(going, part))
        assert list(found) == going
        for index in going:
            expected = model.logits(TokenBatch.of([prompts[index]]), part)[0]
            torch.testing.assert_close(found[index].logits, expected, rtol=0, atol=1e-5)


def test_passes_are_split_only_where_it_saves_more_than_a_pass_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    model, cache = _cached()
    draws = model.draws(8)
    prompts = dict(enumerate([LONG + TAILS[0], LONG + TAILS[1], OTHER + TAILS[2], OTHER + TAILS[3], TAILS[4]]))

    def lengths() -> list[int]:
        groups = grouped(cache, prompts, dict.fromkeys(prompts, draws))
        assert sorted(index for group in groups for index in group.prompts.indices) == list(prompts)
        return sorted(group.length for group in groups)

    assert lengths() == [0, 64, 96]
    monkeypatch.setitem(grouping.PASS_TOKENS, "cpu", 10_000)
    assert lengths() == [0]


@pytest.mark.parametrize(("passes_cost", "lengths"), [(4, [48, 64]), (1000, [48])])
def test_prompts_that_part_late_share_a_pass_from_where_the_first_parts(
    passes_cost: int, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(grouping.PASS_TOKENS, "cpu", passes_cost)
    model, cache = _cached()
    prompts = dict(enumerate([LONG[:64] + tail for tail in TAILS] + [LONG[:48] + tail for tail in TAILS]))
    groups = grouped(cache, prompts, dict.fromkeys(prompts, model.draws(8)))
    assert [group.length for group in groups] == lengths
    assert sum(len(group.prompts.indices) for group in groups) == 10
