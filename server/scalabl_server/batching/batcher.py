"""The batching loop: joins queued inputs into forward passes within a token budget, and runs them on one worker thread.

It never waits for more inputs to arrive. While one pass runs, the next is chosen from the queue (`selection`), so batches
grow with the load, and the worker thread starts it without a gap. A failed pass is split until only the bad input fails.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import threading
import time
import traceback
from bisect import insort
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Executor
from functools import partial
from typing import Any, Generic

from scalabl_server.batching.admission import HEADROOM, Admission, Place
from scalabl_server.batching.faults import Failure, classify
from scalabl_server.batching.jobs import Job, Result
from scalabl_server.batching.selection import PRIORITY_SECONDS, Choice, QueuedInput, Target, select
from scalabl_server.observe.metrics import Metrics
from scalabl_server.observe.trace import Stages
from scalabl_server.problems import Kind, ProblemError

logger = logging.getLogger("scalabl")

RunBatch = Callable[[Sequence[Target], Sequence[Sequence[int]], Sequence[Job]], list[Result]]

LATE = "the answer would come after the request's deadline; send fewer inputs or samples, or try again later"
BROKEN = "the batching loop has crashed; restart the server"


class Batcher(Generic[Target]):
    """Queues inputs and runs them in batches on one worker thread.

    The event loop owns the queue. It moves the inputs of the next pass from the queue into a slot, and puts them back if
    inputs arrive that should run first. When the worker thread is free, it takes the slot. Each pass is one task of the
    executor, and the next task is submitted while it runs; other users of the executor get the thread between two passes.

    Args:
        run: the forward pass, called on `executor`.
        target_tokens: add inputs while expected rows x padded length stays within this; one input alone may exceed it.
        max_tokens: refuse an input whose own rows x length exceed this; no pass may be larger.
        pads: whether passes for an adapter compute padding.
        shape: adapters for which it is equal share passes; they agree in `pads`.
        rest: called on `executor` after a pass that is not followed by another one immediately.
        admission: counts the waiting inputs; an input's place is released when its pass begins.
    """

    def __init__(
        self,
        run: RunBatch[Target],
        executor: Executor,
        admission: Admission,
        metrics: Metrics,
        *,
        target_tokens: int,
        max_tokens: int,
        pads: Callable[[Target], bool] = lambda _: True,
        shape: Callable[[Target], Hashable] = id,
        rest: Callable[[], None] = lambda: None,
    ) -> None:
        self._run, self._executor, self._admission, self._metrics = run, executor, admission, metrics
        self._target_tokens, self._max_tokens, self._pads = target_tokens, max_tokens, pads
        self._shape, self._rest = shape, rest
        self._numbers = itertools.count()
        self._queue: list[QueuedInput[Target]] = []  # sorted by `_order`
        self._slot_lock = threading.Lock()
        self._slot: Choice[Target] | None = None
        self._unanswered: set[QueuedInput[Target]] = set()
        self._stale = True  # whether the slot must be filled again
        self._planning = False  # whether a call of `_plan` is scheduled on the event loop
        self._turns = 0  # tasks of the executor, queued or running
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopped = self._broken = self._device_failed = False
        self._has_run = False  # whether a pass has run since the last rest; only the worker thread uses it
        self._pass_began: float | None = None
        self._pass_ended: float | None = None

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()

    async def stop(self) -> None:
        """Start no further pass, and answer all waiting requests with a 503."""
        self._stopped = True
        self._refuse_all("draining", "the server is shutting down; try another replica")

    def fault(self, longest_pass: float) -> str | None:
        """Why the worker cannot be used any more; None while it works.

        Args:
            longest_pass: seconds after which a pass counts as stuck.
        """
        if self._device_failed:
            return "the device has failed, so every pass fails; restart the server"
        if self._broken:
            return BROKEN
        began = self._pass_began  # read once: the worker thread may set it to None at any time
        running = 0.0 if began is None else time.perf_counter() - began
        if running > longest_pass:
            return (
                f"a pass has run for {running:.0f} s, above the limit of {longest_pass:g} s: the worker is stuck; "
                "restart the server"
            )
        return None

    @property
    def busy(self) -> bool:
        """Whether the worker thread runs a pass."""
        return self._pass_began is not None

    def check_input(self, position: int | None, length: int, rows: int) -> None:
        """Check that an input fits in a pass.

        Args:
            position: of the input in its request; None if it is the only one.
            length: of the prompt in tokens.
            rows: the most rows of the input in one pass.

        Raises:
            ProblemError: `input-too-large`.
        """
        tokens = length * rows
        if tokens > self._max_tokens:
            raise ProblemError(
                "input-too-large",
                f"{length} tokens x {rows} samples = "
                f"{tokens}, above the limit of {self._max_tokens} for one pass; shorten the input or lower num_samples",
                field="inputs" if position is None else f"inputs.{position}",
            )

    def submit(
        self,
        target: Target,
        sequences: Sequence[list[int]],
        jobs: Sequence[Job],
        places: Sequence[Place],
        stages: Stages | None = None,
        deadline: float = math.inf,
    ) -> list[asyncio.Future[Result]]:
        """Queue all inputs of a request, or none of them if one is refused.

        Args:
            places: where `Admission.enter` has admitted the inputs.
            stages: receives the times of the inputs' passes.
            deadline: of the answers, on the clock of `time.perf_counter`.

        Raises:
            ProblemError: `input-too-large` for an input that fits in no pass; `stuck`; and as `Admission.settle`.
        """
        assert self._loop is not None  # started
        if self._broken:
            raise ProblemError("stuck", BROKEN)
        for position, (ids, job) in enumerate(zip(sequences, jobs, strict=True)):
            self.check_input(position if len(sequences) > 1 else None, len(ids), job.demand.at_once)
        expected = [self._admission.expected_rows(job.demand) for job in jobs]
        self._admission.settle(places, [len(ids) * rows for ids, rows in zip(sequences, expected, strict=True)])
        now, slot, futures = time.perf_counter(), self._slot, []
        for ids, job, rows, place in zip(sequences, jobs, expected, places, strict=True):
            queued = QueuedInput(
                target=target,
                token_ids=ids,
                job=job,
                rows=rows,
                rows_at_once=job.demand.at_once,
                place=place,
                result=self._loop.create_future(),
                order=(now + PRIORITY_SECONDS * place.priority, next(self._numbers)),
                deadline=deadline,
                queued_at=now,
                stages=stages or Stages(),
            )
            self._unanswered.add(queued)
            queued.result.add_done_callback(partial(self._ended, queued))
            insort(self._queue, queued, key=_order)
            if slot is None or not slot.full or queued.order < slot.inputs[-1].order:
                self._stale = True
            futures.append(queued.result)
        self._plan_soon()
        return futures

    def _ended(self, queued: QueuedInput[Target], result: asyncio.Future[Result]) -> None:
        """Called when an input has its result or was cancelled."""
        self._unanswered.discard(queued)
        if result.cancelled():
            slot = self._slot
            self._stale = self._stale or (slot is not None and queued in slot.inputs)
            self._plan_soon()

    def _plan_soon(self) -> None:
        """Schedule `_plan`, once for all changes in one iteration of the event loop."""
        if not self._planning:
            assert self._loop is not None  # started
            self._planning = True
            self._loop.call_soon(self._guarded, self._plan)

    def _plan(self) -> None:
        """Drop cancelled inputs, choose the next pass if the queue has changed, and submit a task that will run it."""
        self._planning = False
        if self._stopped or self._broken:
            return
        if any(queued.result.done() for queued in self._queue):
            self._queue = [queued for queued in self._queue if not queued.result.done()]
        with self._slot_lock:
            if self._stale or self._slot is None:
                self._fill_slot()
            chosen = self._slot is not None
        if chosen and self._turns < 2:
            self._turns += 1
            self._executor.submit(self._turn)

    def _fill_slot(self) -> None:
        if self._slot is not None:
            for queued in self._slot.inputs:
                if not queued.result.done():
                    insort(self._queue, queued, key=_order)
        self._slot, self._stale = None, False
        if self._queue:
            self._slot = select(self._queue, self._target_tokens, self._max_tokens, self._pads, self._shape)
            members = set(self._slot.inputs)
            self._queue = [queued for queued in self._queue if queued not in members]

    # The methods from here to `_tell` run on the worker thread. They change the event loop's state only through `_tell`.

    def _turn(self) -> None:
        """Run the pass in the slot; none if all of its inputs were cancelled."""
        try:
            batch = self._take()
            parts = [batch]
            while parts:
                part = [queued for queued in parts.pop() if not queued.result.done()]
                if part:
                    parts += self._answer(part)
            if self._slot is None and self._has_run:
                self._has_run = False
                self._rest()
        except BaseException:
            self._broken = True
            logger.critical(BROKEN, exc_info=True)
            self._tell(self._refuse_all, "stuck", BROKEN)
        finally:
            self._tell(self._turn_ended)

    def _take(self) -> list[QueuedInput[Target]]:
        with self._slot_lock:
            choice, self._slot = self._slot, None
            if choice is None:
                return []
            now = time.perf_counter()
            chosen = [queued for queued in choice.inputs if not queued.result.done()]
            late = [queued for queued in chosen if self._is_late(queued, now)]
            if len(late) == len(chosen):  # run them all the same: only passes can correct a wrong estimate of the speed
                late = []
            batch = [queued for queued in chosen if queued not in late]
            for queued in choice.overtaken:
                queued.overtaken += 1
        gap = None if self._pass_ended is None or self._pass_ended < choice.chosen_at else now - self._pass_ended
        self._tell(self._begun, batch, late, now, gap)
        return batch

    def _is_late(self, queued: QueuedInput[Target], now: float) -> bool:
        """Whether an input would miss its deadline even if it ran alone, and faster than expected (`HEADROOM`)."""
        return now + HEADROOM * self._admission.expected_wait(queued.tokens) > queued.deadline

    def _answer(self, part: list[QueuedInput[Target]]) -> list[list[QueuedInput[Target]]]:
        """Run one pass and deliver its results. After a failure, returns the parts to try again, the last one first."""
        started = self._pass_began = time.perf_counter()
        self._has_run = True
        try:
            results = self._run([q.target for q in part], [q.token_ids for q in part], [q.job for q in part])
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # its variables would keep the tensors of the pass in memory
            failure = classify(error)
        else:
            self._tell(self._answered, part, results, started, time.perf_counter())
            return []
        finally:
            self._pass_ended, self._pass_began = time.perf_counter(), None
        self._metrics.failed_passes.labels(failure.kind).inc()
        self._device_failed = self._device_failed or failure.lasting
        if len(part) > 1 and failure.of_one_input:
            logger.warning("a pass over %d inputs failed, trying each half again: %r", len(part), failure.error)
            self._metrics.batch_splits.inc()
            half = len(part) // 2
            return [part[half:], part[:half]]
        self._tell(self._failed, part, failure)
        return []

    def _tell(self, what: Callable[..., None], *arguments: Any) -> None:
        assert self._loop is not None  # started
        if not self._loop.is_closed():  # after shutdown nobody waits for the result
            self._loop.call_soon_threadsafe(self._guarded, what, *arguments)

    # The methods from here on run on the event loop.

    def _guarded(self, what: Callable[..., None], *arguments: Any) -> None:
        """Call a method of this class; if it raises, refuse all requests, because otherwise they would wait forever."""
        try:
            what(*arguments)
        except BaseException:
            self._broken = True
            self._refuse_all("stuck", BROKEN)
            raise

    def _begun(
        self, batch: list[QueuedInput[Target]], late: list[QueuedInput[Target]], now: float, gap: float | None
    ) -> None:
        for queued in batch + late:
            queued.place.free()
            self._metrics.stage("queue", now - queued.queued_at)
        for queued in late:
            _refuse(queued, ProblemError("deadline-exceeded", LATE))
        self._admission.running_tokens = sum(queued.tokens for queued in batch)
        if gap is not None:
            self._metrics.pass_gap.observe(gap)
        self._plan()

    def _turn_ended(self) -> None:
        self._turns -= 1
        self._admission.running_tokens = 0
        self._plan()

    def _answered(self, part: list[QueuedInput[Target]], results: Sequence[Result], started: float, ended: float) -> None:
        for queued, result in zip(part, results, strict=True):
            queued.stages.took(started, ended)
            if not queued.result.done():
                queued.result.set_result(result)
        assert self._loop is not None  # started
        self._loop.call_soon(self._guarded, self._observe, part, results, ended - started)  # after the waiting requests

    def _failed(self, part: list[QueuedInput[Target]], failure: Failure) -> None:
        for queued in part:
            _refuse(queued, failure.problem(queued.length, queued.rows_at_once))

    def _refuse_all(self, kind: Kind, detail: str) -> None:
        with self._slot_lock:
            self._queue, self._slot = [], None
        for queued in list(self._unanswered):
            queued.place.free()
            _refuse(queued, ProblemError(kind, detail))

    def _observe(self, part: Sequence[QueuedInput[Target]], results: Sequence[Result], seconds: float) -> None:
        taken = [queued.job.rows_taken(result) for queued, result in zip(part, results, strict=True)]
        for queued, count in zip(part, taken, strict=True):
            self._admission.observe_rows(queued.job.demand, count)
        rows = sum(taken)
        tokens = sum(count * queued.length for queued, count in zip(part, taken, strict=True))
        self._admission.observe_pass(tokens, seconds)
        padded = rows * max(queued.length for queued in part) if self._pads(part[0].target) else tokens
        self._metrics.observe_batch(rows, padded, tokens, seconds)


def _order(queued: QueuedInput[Any]) -> tuple[float, int]:
    return queued.order


def _refuse(queued: QueuedInput[Any], error: Exception) -> None:
    if not queued.result.done():
        queued.result.set_exception(error)
