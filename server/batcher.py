"""Admission and batching: a bounded first-come queue of inputs, joined into forward passes by a token budget.

Inputs of one adapter share a pass, those of two never do. There is no waiting window: while one pass runs on the worker's
thread the next inputs gather, so that load makes batches.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from torch import Tensor

from scalabl.posterior import Draws
from server.metrics import Metrics
from server.problems import ProblemError
from server.trace import Stages

Target = TypeVar("Target")  # what a pass runs on: an adapter
RunBatch = Callable[[Target, Sequence[Sequence[int]], Sequence[Draws]], list[Tensor]]


@dataclass(eq=False)
class QueuedInput(Generic[Target]):
    """One prompt that waits for its pass. `logits` resolves to [K, C]; cancelling it drops the work."""

    target: Target
    token_ids: list[int]
    draws: Draws
    logits: asyncio.Future[Tensor]
    queued_at: float = field(default_factory=time.perf_counter)
    stages: Stages = field(default_factory=Stages)

    @property
    def rows(self) -> int:
        return self.draws.num_samples


class Batcher(Generic[Target]):
    """Feeds one worker thread.

    Args:
        run: the forward pass, called on `executor`.
        target_tokens: join inputs while rows x padded length stays within this; one input alone may exceed it.
        max_tokens: refuse an input whose own rows x length exceed this.
        max_queue: refuse when this many inputs wait already.
    """

    def __init__(
        self,
        run: RunBatch[Target],
        executor: Executor,
        metrics: Metrics,
        *,
        target_tokens: int,
        max_tokens: int,
        max_queue: int,
    ) -> None:
        self._run, self._executor, self._metrics = run, executor, metrics
        self._target_tokens, self._max_tokens, self._max_queue = target_tokens, max_tokens, max_queue
        self._queue: deque[QueuedInput[Target]] = deque()
        self._arrived = asyncio.Event()
        self._seconds_per_input = 0.1  # running mean, for Retry-After
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._loop(), name="batcher")

    async def stop(self) -> None:
        """End the loop; whatever still waits is answered with a 503."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        while self._queue:
            queued = self._queue.popleft()
            if not queued.logits.done():
                queued.logits.set_exception(ProblemError("draining", "the server is shutting down; try another replica"))

    def submit(
        self, target: Target, sequences: Sequence[list[int]], draws: Draws, stages: Stages | None = None
    ) -> list[asyncio.Future[Tensor]]:
        """Queue a request's inputs, all of them or none; `stages` is told when they are in a pass.

        Raises:
            ProblemError: `queue-full` with a time to come back, or `input-too-large` for one that no pass can hold.
        """
        for position, ids in enumerate(sequences):
            tokens = len(ids) * draws.num_samples
            if tokens > self._max_tokens:
                field = f"inputs.{position}" if len(sequences) > 1 else "inputs"
                raise ProblemError(
                    "input-too-large",
                    f"{field}: {len(ids)} tokens x {draws.num_samples} samples = {tokens}, above the limit of "
                    f"{self._max_tokens} for one pass; shorten the input or lower num_samples",
                )
        self._drop_abandoned()
        if len(self._queue) + len(sequences) > self._max_queue:
            raise ProblemError(
                "queue-full",
                f"{len(self._queue)} inputs wait and the queue holds {self._max_queue}; "
                f"this request has {len(sequences)}. Try again later or send fewer inputs",
                retry_after=self._seconds_per_input * max(1, len(self._queue)),
            )
        loop = asyncio.get_running_loop()
        queued = [QueuedInput(target, ids, draws, loop.create_future(), stages=stages or Stages()) for ids in sequences]
        self._queue.extend(queued)
        self._metrics.queue_inputs.set(len(self._queue))
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
            batch.append(queued)
        kept.extend(self._queue)
        self._queue = kept
        self._metrics.queue_inputs.set(len(kept))
        return batch

    async def _loop(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._arrived.wait()
            batch = self._next_batch()
            if not batch:
                self._arrived.clear()
                continue
            started = time.perf_counter()
            for queued in batch:
                self._metrics.queue_duration.observe(started - queued.queued_at)
            try:
                results = await loop.run_in_executor(
                    self._executor, self._run, batch[0].target, [q.token_ids for q in batch], [q.draws for q in batch]
                )
            except asyncio.CancelledError:
                self._queue.extendleft(reversed(batch))
                raise
            except Exception as error:
                for queued in batch:
                    if not queued.logits.done():
                        queued.logits.set_exception(error)
                continue
            elapsed = time.perf_counter() - started
            for queued in batch:
                queued.stages.took(started, started + elapsed)
            self._seconds_per_input += 0.1 * (elapsed / len(batch) - self._seconds_per_input)
            rows = sum(queued.rows for queued in batch)
            self._metrics.observe_batch(rows, rows * max(len(q.token_ids) for q in batch), elapsed)
            for queued, logits in zip(batch, results, strict=True):
                if not queued.logits.done():
                    queued.logits.set_result(logits)
