"""Batching: a first-come queue of admitted inputs, joined into forward passes by a token budget, on one worker thread.

Inputs of one adapter share a pass, those of two never do. There is no waiting window: while one pass runs on the worker's
thread the next inputs gather, so that load makes batches. A pass that fails is split until only its cause fails.
"""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from server.admission import Admission, Place
from server.faults import classify
from server.methods import Job, Result, rows_of
from server.metrics import Metrics
from server.problems import ProblemError
from server.trace import Stages

logger = logging.getLogger("scalabl")

Target = TypeVar("Target")  # what a pass runs on: an adapter
RunBatch = Callable[[Target, Sequence[Sequence[int]], Sequence[Job]], list[Result]]


@dataclass(eq=False)
class QueuedInput(Generic[Target]):
    """One prompt that waits for its pass. `logits` resolves to what its job gives; cancelling it drops the work."""

    target: Target
    token_ids: list[int]
    job: Job
    place: Place
    logits: asyncio.Future[Result]
    queued_at: float = field(default_factory=time.perf_counter)
    stages: Stages = field(default_factory=Stages)

    @property
    def rows(self) -> int:
        return self.job.num_samples

    @property
    def tokens(self) -> int:
        return self.rows * len(self.token_ids)


class Batcher(Generic[Target]):
    """Feeds one worker thread.

    Args:
        run: the forward pass, called on `executor`.
        target_tokens: join inputs while rows x padded length stays within this; one input alone may exceed it.
        max_tokens: refuse an input whose own rows x length exceed this.
        admission: counts what waits; an input's place is free once its pass begins.
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
    ) -> None:
        self._run, self._executor, self._admission, self._metrics = run, executor, admission, metrics
        self._target_tokens, self._max_tokens = target_tokens, max_tokens
        self._queue: deque[QueuedInput[Target]] = deque()
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._pass_began: float | None = None
        self._device_failed = False

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._loop(), name="batcher")

    async def stop(self) -> None:
        """End the loop; whatever still waits is answered with a 503."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        while self._queue:
            queued = self._queue.popleft()
            queued.place.free()
            if not queued.logits.done():
                queued.logits.set_exception(ProblemError("draining", "the server is shutting down; try another replica"))

    def fault(self, longest_pass: float) -> str | None:
        """Why the worker cannot be relied on any more; None while it can.

        Args:
            longest_pass: seconds after which a pass counts as stuck.
        """
        if self._device_failed:
            return "the device has failed, and every pass with it; the server must be restarted"
        if self._task is not None and self._task.done():
            return "the task that feeds the model has ended; the server must be restarted"
        began = self._pass_began  # the worker's thread may set it to None at any time
        running = 0.0 if began is None else time.perf_counter() - began
        if running > longest_pass:
            return f"a pass has run for {running:.0f} s, above the limit of {longest_pass:g} s; the worker is stuck"
        return None

    @property
    def busy(self) -> bool:
        """Whether a pass is on the worker's thread."""
        return self._pass_began is not None

    def check_input(self, position: int | None, length: int, num_samples: int) -> None:
        """Whether a pass can hold an input.

        Args:
            position: among the request's inputs, None for a single one.

        Raises:
            ProblemError: `input-too-large`.
        """
        tokens = length * num_samples
        if tokens > self._max_tokens:
            raise ProblemError(
                "input-too-large",
                f"{'inputs' if position is None else f'inputs.{position}'}: {length} tokens x {num_samples} samples = "
                f"{tokens}, above the limit of {self._max_tokens} for one pass; shorten the input or lower num_samples",
            )

    def submit(
        self,
        target: Target,
        sequences: Sequence[list[int]],
        jobs: Sequence[Job],
        places: Sequence[Place],
        stages: Stages | None = None,
    ) -> list[asyncio.Future[Result]]:
        """Queue a request's inputs, all of them or none, each with its job and the place it was admitted to.

        Args:
            stages: told when the inputs are in a pass.

        Raises:
            ProblemError: `input-too-large` for one that no pass can hold; otherwise as `Admission.settle`.
        """
        for position, (ids, job) in enumerate(zip(sequences, jobs, strict=True)):
            self.check_input(position if len(sequences) > 1 else None, len(ids), job.num_samples)
        self._admission.settle(places, [len(ids) * job.num_samples for ids, job in zip(sequences, jobs, strict=True)])
        self._drop_abandoned()
        loop = asyncio.get_running_loop()
        queued = [
            QueuedInput(target, ids, job, place, loop.create_future(), stages=stages or Stages())
            for ids, job, place in zip(sequences, jobs, places, strict=True)
        ]
        self._queue.extend(queued)
        self._arrived.set()
        return [each.logits for each in queued]

    def _drop_abandoned(self) -> None:
        if any(queued.logits.done() for queued in self._queue):
            self._queue = deque(queued for queued in self._queue if not queued.logits.done())

    def _next_batch(self) -> list[QueuedInput[Target]]:
        """The head of the queue and, in order, those for the same adapter behind it, as many as the budget holds."""
        self._drop_abandoned()
        batch: list[QueuedInput[Target]] = []
        kept: deque[QueuedInput[Target]] = deque()
        rows = longest = 0
        while self._queue:
            queued = self._queue.popleft()
            if batch and queued.target is not batch[0].target:
                kept.append(queued)
                continue
            longest = max(longest, len(queued.token_ids))
            if batch and (rows + queued.rows) * longest > self._target_tokens:
                kept.append(queued)
                break
            rows += queued.rows
            queued.place.free()
            batch.append(queued)
        kept.extend(self._queue)
        self._queue = kept
        return batch

    async def _loop(self) -> None:
        while True:
            await self._arrived.wait()
            batch = self._next_batch()
            if not batch:
                self._arrived.clear()
                continue
            now = time.perf_counter()
            for queued in batch:
                self._metrics.stage("queue", now - queued.queued_at)
            parts = [batch]
            try:
                while parts:
                    part = [queued for queued in parts.pop() if not queued.logits.done()]
                    if part:
                        parts += await self._answer(part)
            except asyncio.CancelledError:
                self._queue.extendleft(queued for queued in reversed(batch) if not queued.logits.done())
                raise

    async def _answer(self, part: list[QueuedInput[Target]]) -> list[list[QueuedInput[Target]]]:
        """Run one pass and answer its inputs; after a failure, the parts to try again, the last one first."""
        self._admission.running_tokens = sum(queued.tokens for queued in part)
        started = time.perf_counter()
        failure = None
        results: list[Result] = []
        try:
            results = await asyncio.get_running_loop().run_in_executor(
                self._executor, self._timed, part[0].target, [q.token_ids for q in part], [q.job for q in part]
            )
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # whose variables hold the pass's tensors
            failure = classify(error)
        finally:
            self._admission.running_tokens = 0
        if failure is None:
            ended = time.perf_counter()
            self._observe(part, results, ended - started)
            for queued in part:
                queued.stages.took(started, ended)
            for queued, logits in zip(part, results, strict=True):
                if not queued.logits.done():
                    queued.logits.set_result(logits)
            return []
        self._metrics.failed_passes.labels(failure.kind).inc()
        self._device_failed = self._device_failed or failure.lasting
        if len(part) > 1 and not failure.lasting:
            logger.warning("a pass over %d inputs failed, trying its parts: %r", len(part), failure.error)
            self._metrics.batch_splits.inc()
            half = len(part) // 2
            return [part[half:], part[:half]]
        for queued in part:
            if not queued.logits.done():
                queued.logits.set_exception(failure.problem(len(queued.token_ids), queued.rows))
        return []

    def _timed(self, target: Target, sequences: Sequence[Sequence[int]], jobs: Sequence[Job]) -> list[Result]:
        """On the worker's thread: the pass counts as running until it really ends, even when nobody waits for it."""
        self._pass_began = time.perf_counter()
        try:
            return self._run(target, sequences, jobs)
        finally:
            self._pass_began = None

    def _observe(self, part: Sequence[QueuedInput[Target]], results: Sequence[Result], seconds: float) -> None:
        each = [rows_of(queued.job, result) for queued, result in zip(part, results, strict=True)]
        rows = sum(each)
        tokens = sum(taken * len(queued.token_ids) for queued, taken in zip(part, each, strict=True))
        self._admission.observe_pass(tokens, seconds)
        self._metrics.observe_batch(rows, rows * max(len(queued.token_ids) for queued in part), tokens, seconds)
