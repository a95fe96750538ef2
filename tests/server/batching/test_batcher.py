"""The batching loop with a real worker thread, and passes that a test can hold up."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Awaitable, Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from scalabl_server.batching.admission import Admission
from scalabl_server.batching.batcher import Batcher
from scalabl_server.batching.jobs import AdaptiveJob, Job, Result, SampledJob
from scalabl_server.observe.metrics import Metrics
from scalabl_server.problems import ProblemError

from scalabl.model.posterior import Draws
from scalabl.uncertainty.adaptive import Rule

UNLUCKY = 13  # the first token of an input on which a pass fails


class Passes:
    """A forward pass that records its arguments. The result of each input is its first token."""

    def __init__(self) -> None:
        self.lengths: list[list[int]] = []
        self.firsts: list[list[int]] = []
        self.targets: list[list[str | None]] = []
        self.entered, self.gate = threading.Event(), threading.Event()
        self.gate.set()
        self.memory = 10**9  # tokens
        self.error: BaseException | None = None
        self.rested: list[int] = []

    def rest(self) -> None:
        self.rested.append(len(self.lengths))

    def __call__(
        self, targets: Sequence[str | None], sequences: Sequence[Sequence[int]], jobs: Sequence[Job]
    ) -> list[Result]:
        self.lengths.append([len(ids) for ids in sequences])
        self.targets.append(list(targets))
        self.firsts.append([ids[0] for ids in sequences])
        self.entered.set()
        assert self.gate.wait(30)
        if self.error is not None:
            raise self.error
        if sum(len(ids) * job.demand.at_once for ids, job in zip(sequences, jobs, strict=True)) > self.memory:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory")
        if any(ids[0] == UNLUCKY for ids in sequences):
            raise RuntimeError("unlucky")
        return [Result(torch.full((job.demand.at_once, 2), float(ids[0]))) for ids, job in zip(sequences, jobs, strict=True)]


def draws(num_samples: int) -> Draws:
    return Draws(0, "gaussian", torch.zeros(num_samples, 3))


def sampled(num_samples: int = 2) -> Job:
    return SampledJob(draws(num_samples), 2)


def submit(
    batcher: Batcher[str | None],
    target: str | None,
    sequences: list[list[int]],
    job: Job,
    *,
    priority: int = 0,
    deadline: float = math.inf,
) -> list[asyncio.Future[Result]]:
    """Queue inputs as a request does: first admission, then submission."""
    places = admission_of(batcher).enter([1] * len(sequences), 10**6, priority)
    futures = batcher.submit(target, sequences, [job] * len(sequences), places, deadline=deadline)
    for future, place in zip(futures, places, strict=True):
        future.add_done_callback(lambda _, place=place: place.free())
    return futures


def admission_of(batcher: Batcher[str | None]) -> Admission:
    return batcher._admission


def with_batcher(
    scenario: Callable[[Batcher[str | None], Passes], Awaitable[None]],
    *,
    target_tokens: int = 100,
    max_tokens: int = 1000,
    max_queue: int = 50,
    max_queue_tokens: int = 10_000,
    shape: Callable[[str | None], Hashable] = id,
) -> Passes:
    passes = Passes()

    async def run() -> None:
        metrics = Metrics()
        admission = Admission(max_queue, max_queue_tokens, metrics)
        with ThreadPoolExecutor(1) as executor:
            limits = {"target_tokens": target_tokens, "max_tokens": max_tokens}
            batcher = Batcher(passes, executor, admission, metrics, **limits, shape=shape, rest=passes.rest)
            batcher.start()
            try:
                await asyncio.wait_for(scenario(batcher, passes), 30)
            finally:
                passes.gate.set()
                await batcher.stop()

    asyncio.run(run())
    return passes


async def hold(batcher: Batcher[str | None], passes: Passes) -> asyncio.Future[Result]:
    """Keep the worker busy with one input, so that everything queued afterwards must wait."""
    passes.gate.clear()
    (held,) = submit(batcher, None, [[1]], sampled())
    assert await asyncio.to_thread(passes.entered.wait, 30)
    return held


async def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        await asyncio.sleep(0)


def chosen(batcher: Batcher[str | None]) -> list[int]:
    """The first tokens of the inputs in the next pass."""
    slot = batcher._slot
    return [] if slot is None else [queued.token_ids[0] for queued in slot.inputs]


def test_what_waits_is_joined_up_to_the_target_in_order_of_arrival() -> None:
    async def scenario(batcher: Batcher[str | None], passes: Passes) -> None:
        await hold(batcher, passes)
        waiting = []
        for first in (2, 3, 4, 5, 6):
            waiting += submit(batcher, None, [[first] * 10], sampled(num_samples=2))
        passes.gate.set()
        answers = await asyncio.gather(*waiting)
        assert [float(result.logits[0, 0]) for result in answers] == [2, 3, 4, 5, 6]

    passes = with_batcher(scenario, target_tokens=60)
    assert passes.firsts == [[1], [2, 3, 4], [5, 6]], "3 inputs x 2 samples x 10 tokens fill a pass"


def test_inputs_of_like_length_share_a_pass_and_little_is_padded() -> None:
    async def scenario(batcher: Batcher[str | None], passes: Passes) -> None:
        await hold(batcher, passes)
        waiting = submit(batcher, None, [[2] * 20, [3], [4] * 19, [5]], sampled(num_samples=2))
        passes.gate.set()
        await asyncio.gather(*waiting)

    passes = with_batcher(scenario, target_tokens=80)
    assert passes.lengths == [[1], [20, 19], [1, 1]]


def test_an_input_above_the_target_runs_alone() -> None:
    async def scenario(batcher: Batcher[str | None], passes: Passes) -> None:
        await hold(batcher, passes)
        waiting = submit(batcher, None, [[2], [3] * 200, [4]], sampled(num_samples=2))
        passes.gate.set()
        await asyncio.gather(*waiting)

    assert with_batcher(scenario, target_tokens=100).firsts == [[1], [2, 4], [3]]


def test_inputs_with_different_draws_share_a_pass() -> None:
    async def scenario(batcher: Batcher[str | None], passes: Passes) -> None:
        await hold(batcher, passes)
        waiting = submit(batcher, None, [[2]], sampled(3)) + submit(batcher, None, [[3]], sampled(5))
        passes.gate.set()
        answers = await asyncio.gather(*waiting)
        assert [tuple(result.logits.shape) for result in answers] == [(3, 2), (5, 2)]

    assert with_batcher(scenario).firsts == [[1], [2, 3]]


def test_two_adapters_never_share_a_pass_and_keep_their_order() -> None:
    async def scenario(batcher: Batcher[str | None], passes: Passes) -> None:
        await hold(batcher, passes)
        waiting = []
        for first, adapter in ((2, "x"), (3, "y"), (4, "x"), (5, "y"), (6, "x"), (7, "z")):
            waiting += submit(batcher, adapter, [[first] * 10], sampled(num_samples=2))
        passes.gate.set()
        answers = await asyncio.gather(*waiting)
        assert [float(result.logits[0, 0]) for result in answers] == [2, 3, 4, 5, 6, 7]

    passes = with_batcher(scenario, target_tokens=40)
    assert passes.firsts == [[1], [2, 4], [3, 5], [6], [7]], "2 inputs fill a pass"
    assert passes.targets == [[None], ["x", "x"], ["y", "y"], ["x"], ["z"]]


def test_adapters_of_one_shape_share_a_pass_and_each_input_keeps_its_own() -> None:
    async def scenario(batcher: Batcher[str | None], passes: Passes) -> None:
        await hold(batcher, passes)
        waiting = []
        for first, adapter in ((2, "x1"), (3, "y1"), (4, "x2"), (5, "y1"), (6, "x1")):
            waiting += submit(batcher, adapter, [[first] * 10], sampled(num_samples=2))
        passes.gate.set()
        answers = await asyncio.gather(*waiting)
        assert [float(result.logits[0, 0]) for result in answers] == [2, 3, 4, 5, 6]

    passes = with_batcher(scenario, target_tokens=60, shape=lambda adapter: adapter and adapter[0])
    assert passes.targets == [[None], ["x1", "x2", "x1"], ["y1", "y1"]]


def test_an_input_that_no_pass_can_hold_is_refused_and_nothing_of_its_request_queued() -> None:
    async def scenario(batcher: Batcher[str | None], passes: Passes) -> None:
        with pytest.raises(ProblemError, match=r"inputs\.1: 501 tokens x 2 samples = 1002, above the limit of 1000"):
            submit(batcher, None, [[2], [3] * 501], sampled(2))
        (answer,) = submit(batcher, None, [[4] * 500], sampled(2))
        await answer

    assert with_batcher(scenario).firsts == [[4]]


def test_a_request_is_admitted_whole_or_not_at_all() -> None:
    async def scenario(batcher: Batcher[str | None], passes: Passes) -> None:
        await hold(batcher, passes)
        kept = submit(batcher, None, [[2], [3]], sampled())
        with pytest.raises(ProblemError, match="2 inputs wait and the queue is limited to 3; this request has 2") as caught:
            submit(batcher, None, [[4], [5]], sampled())
        assert caught.value.kind == "queue-full"
        assert caught.value.retry_after is not None
        kept += submit(batcher, None, [[6]], sampled())
        passes.gate.set()
        await asyncio.gather(*kept)

    assert with_batcher(scenario, max_queue=3).firsts == [[1], [2, 3, 6]]


def test_abandoned_inputs_free_their_place_and_are_not_run() -> None:
    async def scenario(batcher: Batcher[str | None], passes: Passes) -> None:
        await hold(batcher, passes)
        for future in submit(batcher, None, [[2], [3]], sampled()):
            future.cancel()
        await asyncio.sleep(0)  # a cancelled future tells on the loop's next turn
        kept = submit(batcher, None, [[4], [5]], sampled())
        kept[0].cancel()
        passes.gate.set()
        await kept[1]

    assert with_batcher(scenario, max_queue=2).firsts == [[1], [5]]


@pytest.mark.parametrize("inputs", [1, 2, 3, 8])
def test_a_failing_pass_is_split_until_only_its_cause_fails(inputs: int) -> None:
    async def scenario(batcher: Batcher[str | None], passes: Passes) -> None:
        await hold(batcher, passes)
        futures = submit(batcher, None, [[20 + n] for n in range(inputs - 1)] + [[UNLUCKY]], sampled())
        passes.gate.set()
        *lucky, unlucky = await asyncio.gather(*futures, return_exceptions=True)
        assert [float(result.logits[0, 0]) for result in lucky] == [20 + n for n in range(inputs - 1)]  # type: ignore[union-attr]
        assert isinstance(unlucky, ProblemError)
        assert (unlucky.kind, "unlucky" in unlucky.detail) == ("internal-error", False)
        (answer,) = submit(batcher, None, [[3]], sampled())
        assert float((await answer).logits[0, 0]) == 3

    passes = with_batcher(scenario)
    assert passes.firsts[-1] == [3]
    assert len(passes.firsts) <= 3 + 2 * inputs.bit_length()


def test_a_batch_that_does_not_fit_in_memory_runs_in_parts_and_a_single_input_is_told() -> None:
    async def scenario(batcher: Batcher[str | None], passes: Passes) -> None:
        passes.memory = 10  # tokens
        await hold(batcher, passes)
        fits = submit(batcher, None, [[2] * 4, [3] * 4, [4] * 4], sampled(2))
        (never,) = submit(batcher, None, [[5] * 6], sampled(2))
        passes.gate.set()
        assert [float((await future).logits[0, 0]) for future in fits] == [2, 3, 4]
        with pytest.raises(ProblemError, match=r"6 tokens x 2 samples does not fit.*lower num_samples") as caught:
            await never
        assert caught.value.kind == "out-of-memory"
        assert batcher.fault(300) is None

    with_batcher(scenario)


def test_a_device_that_is_gone_fails_everybody_at_once_and_is_a_fault() -> None:
    async def scenario(batcher: Batcher[str | None], passes: Passes) -> None:
        passes.error = torch.AcceleratorError("CUDA error: device-side assert triggered")
        await hold(batcher, passes)
        futures = submit(batcher, None, [[2], [3], [4], [5]], sampled())
        passes.gate.set()
        answers = await asyncio.gather(*futures, return_exceptions=True)
        assert all(isinstance(answer, ProblemError) and answer.kind == "internal-error" for answer in answers)
        assert "the device has failed" in (batcher.fault(300) or "")

    assert with_batcher(scenario).firsts == [[1], [2, 3, 4, 5]], "no use in trying parts"


def test_a_pass_that_does_not_end_is_a_fault_and_stays_one_when_nobody_waits_for_it() -> None:
    async def scenario(batcher: Batcher[str | None], passes: Passes) -> None:
        assert batcher.fault(0.01) is None
        held = await hold(batcher, passes)
        while batcher.fault(0.01) is None:
            await asyncio.sleep(0)
        assert "a pass has run for" in (batcher.fault(0.01) or "")
        assert batcher.fault(300) is None
        held.cancel()
        await batcher.stop()
        assert batcher.busy
        passes.gate.set()
        while batcher.busy:
            await asyncio.sleep(0)

    with_batcher(scenario)


def test_a_loop_that_has_died_is_a_fault() -> None:
    class Fatal(BaseException):
        """What no handler of errors catches."""

    async def scenario(batcher: Batcher[str | None], passes: Passes) -> None:
        passes.error = Fatal()
        submit(batcher, None, [[2]], sampled())
        while batcher.fault(300) is None:
            await asyncio.sleep(0.001)
        assert "the batching loop has crashed; restart the server" in (batcher.fault(300) or "")

    with_batcher(scenario)


def test_an_error_of_the_batchers_own_is_a_fault_that_leaves_nobody_waiting() -> None:
    async def scenario(batcher: Batcher[str | None], passes: Passes) -> None:
        held = await hold(batcher, passes)
        (waiting,) = submit(batcher, None, [[2]], sampled())
        batcher._metrics.stage = None  # type: ignore[assignment,method-assign]  # called as a pass begins and after it
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        passes.gate.set()
        await held
        with pytest.raises(ProblemError, match="restart the server") as caught:
            await waiting
        assert caught.value.kind == "stuck"
        assert batcher.fault(300) is not None
        with pytest.raises(ProblemError, match="restart the server"):
            submit(batcher, None, [[3]], sampled())

    with_batcher(scenario)


def test_the_worker_rests_after_a_pass_that_no_other_follows() -> None:
    async def scenario(batcher: Batcher[str | None], passes: Passes) -> None:
        await hold(batcher, passes)
        waiting = submit(batcher, None, [[2]], sampled())
        await until(lambda: chosen(batcher) == [2])
        passes.gate.set()
        await asyncio.gather(*waiting)
        await until(lambda: passes.rested == [2])

    with_batcher(scenario)


def test_the_next_pass_is_chosen_while_one_runs_and_takes_in_what_still_comes() -> None:
    async def scenario(batcher: Batcher[str | None], passes: Passes) -> None:
        await hold(batcher, passes)
        waiting = submit(batcher, None, [[2]], sampled())
        await until(lambda: chosen(batcher) == [2])
        waiting += submit(batcher, None, [[3]], sampled())
        await until(lambda: chosen(batcher) == [2, 3])
        waiting += submit(batcher, None, [[4]], sampled(), priority=-1)
        await until(lambda: chosen(batcher) == [4, 2, 3])
        waiting[0].cancel()
        await until(lambda: chosen(batcher) == [4, 3])
        assert admission_of(batcher).inputs == 2, "they wait until the pass begins"
        passes.gate.set()
        await asyncio.gather(*waiting[1:])
        assert admission_of(batcher).inputs == 0

    assert with_batcher(scenario).firsts == [[1], [4, 3]]


def test_what_is_given_up_after_it_was_chosen_does_not_run_even_if_the_loop_has_not_noticed() -> None:
    async def scenario(batcher: Batcher[str | None], passes: Passes) -> None:
        await hold(batcher, passes)
        gone, kept = submit(batcher, None, [[2], [3]], sampled())
        await until(lambda: chosen(batcher) == [2, 3])
        gone.cancel()
        passes.entered.clear()
        passes.gate.set()
        assert passes.entered.wait(30), "on the worker's thread, while this one keeps the loop"
        await kept

    assert with_batcher(scenario).firsts == [[1], [3]]


def test_the_thread_goes_to_the_next_pass_while_the_loop_is_busy() -> None:
    async def scenario(batcher: Batcher[str | None], passes: Passes) -> None:
        await hold(batcher, passes)
        waiting = submit(batcher, None, [[2]], sampled())
        await until(lambda: chosen(batcher) == [2])
        passes.gate.set()
        deadline = time.monotonic() + 30
        while passes.firsts != [[1], [2]]:  # without a turn of the loop
            assert time.monotonic() < deadline
        await asyncio.gather(*waiting)
        gaps = next(iter(batcher._metrics.pass_gap.collect()))
        assert next(each.value for each in gaps.samples if each.name.endswith("_count")) == 1

    with_batcher(scenario)


def test_others_get_the_thread_between_two_passes() -> None:
    async def scenario(batcher: Batcher[str | None], passes: Passes) -> None:
        await hold(batcher, passes)
        waiting = submit(batcher, None, [[first] * (10 * first) for first in range(2, 8)], sampled())
        await until(lambda: chosen(batcher) != [])
        seen = batcher._executor.submit(lambda: len(passes.firsts))
        passes.gate.set()
        await asyncio.gather(*waiting)
        assert seen.result() < len(passes.firsts)

    with_batcher(scenario)


def test_lower_priorities_go_first_and_none_waits_for_ever() -> None:
    async def scenario(batcher: Batcher[str | None], passes: Passes) -> None:
        await hold(batcher, passes)
        waiting = []
        for first, priority in ((2, 1), (3, 0), (4, -1), (5, 0), (6, -1)):
            waiting += submit(batcher, None, [[first] * 50], sampled(), priority=priority)
        passes.gate.set()
        await asyncio.gather(*waiting)

    assert with_batcher(scenario).firsts == [[1], [4], [6], [3], [5], [2]]


def test_a_deadline_that_cannot_be_met_ends_the_wait_before_the_pass() -> None:
    async def scenario(batcher: Batcher[str | None], passes: Passes) -> None:
        for _ in range(50):
            admission_of(batcher).observe_pass(tokens=100, seconds=1000.0)
        await hold(batcher, passes)
        (hopeless,) = submit(batcher, None, [[2] * 10], sampled(), deadline=time.perf_counter() + 90)
        (tight,) = submit(batcher, None, [[3] * 10], sampled(), deadline=time.perf_counter() + 150)
        passes.gate.set()
        await tight
        with pytest.raises(ProblemError, match="would come after the request's deadline") as caught:
            await hopeless
        assert caught.value.kind == "deadline-exceeded"
        assert admission_of(batcher).inputs == 0

    assert with_batcher(scenario).firsts == [[1], [3]], "20 tokens at 10 s each: half of that is 100 s"


def test_when_nothing_else_waits_a_hopeless_input_is_tried_so_that_one_slow_pass_does_not_stop_all() -> None:
    async def scenario(batcher: Batcher[str | None], passes: Passes) -> None:
        for _ in range(50):
            admission_of(batcher).observe_pass(tokens=100, seconds=1000.0)
        for _ in range(98):
            (hopeless,) = submit(batcher, None, [[2] * 10], sampled(), deadline=time.perf_counter() + 30)
            await hopeless
        assert admission_of(batcher).expected_wait(20) < 1

    with_batcher(scenario)


def test_inputs_that_take_as_many_samples_as_they_need_count_as_what_others_took() -> None:
    rule = Rule(most=64)
    job = AdaptiveJob(draws(64), 2, rule)

    async def scenario(batcher: Batcher[str | None], passes: Passes) -> None:
        queue = admission_of(batcher)
        assert queue.expected_rows(job.demand) == 64
        for _ in range(100):
            queue.observe_rows(job.demand, 8)
        assert queue.expected_rows(job.demand) == 8 + 1
        await hold(batcher, passes)
        waiting = submit(batcher, None, [[2] * 2, [3] * 2, [4] * 2, [5] * 2], job)
        assert queue.tokens == 4 * 2 * 9
        passes.gate.set()
        await asyncio.gather(*waiting)
        with pytest.raises(ProblemError, match="6 tokens x 32 samples = 192, above the limit of 191"):
            submit(batcher, None, [[2] * 6], job)

    passes = with_batcher(scenario, target_tokens=1000, max_tokens=191)
    assert passes.firsts == [[1], [2, 3], [4, 5]], "a round may have 32 rows of each, and the pass holds 95 for 2 tokens"


def test_stopping_answers_what_still_waits() -> None:
    async def scenario(batcher: Batcher[str | None], passes: Passes) -> None:
        held = await hold(batcher, passes)
        waiting = submit(batcher, None, [[2], [3]], sampled())
        await batcher.stop()
        for future in [held, *waiting]:
            with pytest.raises(ProblemError, match="the server is shutting down; try another replica") as caught:
                await future
            assert caught.value.kind == "draining"
        assert admission_of(batcher).inputs == 0

    assert with_batcher(scenario).firsts == [[1]]
