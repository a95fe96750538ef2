"""Admission and batching, on a real thread and with passes that wait at a gate."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from scalabl.posterior import Draws
from server.batcher import Batcher
from server.metrics import Metrics
from server.problems import ProblemError


class Passes:
    """A forward pass that records what it was given: each answer is the input's first token."""

    def __init__(self) -> None:
        self.lengths: list[list[int]] = []
        self.firsts: list[list[int]] = []
        self.targets: list[str | None] = []
        self.entered, self.gate = threading.Event(), threading.Event()
        self.gate.set()

    def __call__(self, target: str | None, sequences: Sequence[Sequence[int]], draws: Sequence[Draws]) -> list[Tensor]:
        self.lengths.append([len(ids) for ids in sequences])
        self.targets.append(target)
        self.firsts.append([ids[0] for ids in sequences])
        self.entered.set()
        assert self.gate.wait(30)
        if any(ids[0] == 13 for ids in sequences):
            raise RuntimeError("unlucky")
        return [torch.full((each.num_samples, 2), float(ids[0])) for ids, each in zip(sequences, draws, strict=True)]


def draws(num_samples: int = 2) -> Draws:
    return Draws(0, "gaussian", torch.zeros(num_samples, 3))


def with_batcher(
    scenario: Callable[[Batcher[str | None], Passes], Awaitable[None]],
    *,
    target_tokens: int = 100,
    max_tokens: int = 1000,
    max_queue: int = 50,
) -> Passes:
    passes = Passes()

    async def run() -> None:
        limits = {"target_tokens": target_tokens, "max_tokens": max_tokens, "max_queue": max_queue}
        with ThreadPoolExecutor(1) as executor:
            batcher = Batcher(passes, executor, Metrics(), **limits)
            batcher.start()
            try:
                await asyncio.wait_for(scenario(batcher, passes), 30)
            finally:
                passes.gate.set()
                await batcher.stop()

    asyncio.run(run())
    return passes


async def hold(batcher: Batcher[str | None], passes: Passes) -> asyncio.Future[Tensor]:
    """Occupy the worker with one input of its own, so that what follows has to wait."""
    passes.gate.clear()
    (held,) = batcher.submit(None, [[1]], draws())
    assert await asyncio.to_thread(passes.entered.wait, 30)
    return held


def test_what_waits_is_joined_up_to_the_target_in_order_of_arrival() -> None:
    async def scenario(batcher: Batcher[str | None], passes: Passes) -> None:
        await hold(batcher, passes)
        waiting = []
        for first in (2, 3, 4, 5, 6):
            waiting += batcher.submit(None, [[first] * 10], draws(num_samples=2))
        passes.gate.set()
        answers = await asyncio.gather(*waiting)
        assert [float(logits[0, 0]) for logits in answers] == [2, 3, 4, 5, 6]

    passes = with_batcher(scenario, target_tokens=60)
    assert passes.firsts == [[1], [2, 3, 4], [5, 6]], "3 inputs x 2 samples x 10 tokens fill a pass"


def test_the_target_counts_padding() -> None:
    async def scenario(batcher: Batcher[str | None], passes: Passes) -> None:
        await hold(batcher, passes)
        waiting = batcher.submit(None, [[2] * 20, [3], [4]], draws(num_samples=2))
        passes.gate.set()
        await asyncio.gather(*waiting)

    passes = with_batcher(scenario, target_tokens=80)
    assert passes.lengths == [[1], [20, 1], [1]]


def test_an_input_above_the_target_runs_alone() -> None:
    async def scenario(batcher: Batcher[str | None], passes: Passes) -> None:
        await hold(batcher, passes)
        waiting = batcher.submit(None, [[2], [3] * 200, [4]], draws(num_samples=2))
        passes.gate.set()
        await asyncio.gather(*waiting)

    assert with_batcher(scenario, target_tokens=100).firsts == [[1], [2], [3], [4]]


def test_inputs_with_different_draws_share_a_pass() -> None:
    async def scenario(batcher: Batcher[str | None], passes: Passes) -> None:
        await hold(batcher, passes)
        waiting = batcher.submit(None, [[2]], draws(3)) + batcher.submit(None, [[3]], draws(5))
        passes.gate.set()
        answers = await asyncio.gather(*waiting)
        assert [tuple(logits.shape) for logits in answers] == [(3, 2), (5, 2)]

    assert with_batcher(scenario).firsts == [[1], [2, 3]]


def test_two_adapters_never_share_a_pass_and_keep_their_order() -> None:
    async def scenario(batcher: Batcher[str | None], passes: Passes) -> None:
        await hold(batcher, passes)
        waiting = []
        for first, adapter in ((2, "x"), (3, "y"), (4, "x"), (5, "y"), (6, "x"), (7, "z")):
            waiting += batcher.submit(adapter, [[first] * 10], draws(num_samples=2))
        passes.gate.set()
        answers = await asyncio.gather(*waiting)
        assert [float(logits[0, 0]) for logits in answers] == [2, 3, 4, 5, 6, 7]

    passes = with_batcher(scenario, target_tokens=40)
    assert passes.firsts == [[1], [2, 4], [3, 5], [6], [7]], "2 inputs fill a pass"
    assert passes.targets == [None, "x", "y", "x", "z"]


def test_an_input_that_no_pass_can_hold_is_refused_and_nothing_of_its_request_queued() -> None:
    async def scenario(batcher: Batcher[str | None], passes: Passes) -> None:
        with pytest.raises(ProblemError, match=r"inputs\.1: 501 tokens x 2 samples = 1002, above the limit of 1000"):
            batcher.submit(None, [[2], [3] * 501], draws(2))
        (answer,) = batcher.submit(None, [[4] * 500], draws(2))
        await answer

    assert with_batcher(scenario).firsts == [[4]]


def test_a_request_is_admitted_whole_or_not_at_all() -> None:
    async def scenario(batcher: Batcher[str | None], passes: Passes) -> None:
        await hold(batcher, passes)
        kept = batcher.submit(None, [[2], [3]], draws())
        with pytest.raises(ProblemError, match="2 inputs wait and the queue holds 3; this request has 2") as caught:
            batcher.submit(None, [[4], [5]], draws())
        assert caught.value.slug == "queue-full"
        assert caught.value.retry_after is not None
        kept += batcher.submit(None, [[6]], draws())
        passes.gate.set()
        await asyncio.gather(*kept)

    assert with_batcher(scenario, max_queue=3).firsts == [[1], [2, 3, 6]]


def test_abandoned_inputs_free_their_place_and_are_not_run() -> None:
    async def scenario(batcher: Batcher[str | None], passes: Passes) -> None:
        await hold(batcher, passes)
        for future in batcher.submit(None, [[2], [3]], draws()):
            future.cancel()
        kept = batcher.submit(None, [[4], [5]], draws())
        kept[0].cancel()
        passes.gate.set()
        await kept[1]

    assert with_batcher(scenario, max_queue=2).firsts == [[1], [5]]


def test_a_failing_pass_reaches_its_inputs_and_the_next_one_runs() -> None:
    async def scenario(batcher: Batcher[str | None], passes: Passes) -> None:
        await hold(batcher, passes)
        unlucky = batcher.submit(None, [[13], [2]], draws(20))
        passes.gate.set()
        for future in unlucky:
            with pytest.raises(RuntimeError, match="unlucky"):
                await future
        (answer,) = batcher.submit(None, [[3]], draws())
        assert float((await answer)[0, 0]) == 3

    assert with_batcher(scenario).firsts == [[1], [13, 2], [3]]


def test_stopping_answers_what_still_waits() -> None:
    async def scenario(batcher: Batcher[str | None], passes: Passes) -> None:
        held = await hold(batcher, passes)
        waiting = batcher.submit(None, [[2], [3]], draws())
        await batcher.stop()
        for future in [held, *waiting]:
            with pytest.raises(ProblemError, match="the server is shutting down; try another replica") as caught:
                await future
            assert caught.value.slug == "draining"

    assert with_batcher(scenario).firsts == [[1]]
