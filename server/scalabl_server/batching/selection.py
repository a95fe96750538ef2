"""Choosing the inputs of the next pass: always the first one in the queue, and others that add little padding.

Pure functions; `batcher` has the queue. The cost of a pass is modelled as rows x padded length plus a fixed cost. An input
joins a pass if the padding that it adds costs less than the fixed cost of another pass. Without padding, inputs join in
their order.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, TypeVar

from scalabl_server.batching.admission import Place
from scalabl_server.batching.jobs import Job, Result
from scalabl_server.observe.trace import Stages

Target = TypeVar("Target")  # what a pass runs on: an adapter

PRIORITY_SECONDS = 1.0  # one step of priority is worth this much waiting
MOST_OVERTAKEN = 4  # how many passes with later inputs may run before an input; then it must be next
WINDOW = 256  # only this many inputs at the head of the queue are considered, to bound the time of a choice
FIXED_SHARE = 0.05  # fixed cost of a pass, as a share of a full pass; `budget.knee` measures the budget with the same share


@dataclass(eq=False)
class QueuedInput(Generic[Target]):
    """One prompt that waits for its pass.

    Attributes:
        rows: expected batch rows, in one pass or several.
        rows_at_once: the most batch rows in a single pass.
        result: resolves to the result of the passes; cancelling it drops the work.
        order: position in the queue: (arrival time + `PRIORITY_SECONDS` per step of priority, a unique number).
        deadline: on the clock of `time.perf_counter`.
        overtaken: the number of passes in which later inputs ran before this one.
    """

    target: Target
    token_ids: list[int]
    job: Job
    rows: int
    rows_at_once: int
    place: Place
    result: asyncio.Future[Result]
    order: tuple[float, int]
    deadline: float = math.inf
    queued_at: float = field(default_factory=time.perf_counter)
    stages: Stages = field(default_factory=Stages)
    overtaken: int = 0

    @property
    def length(self) -> int:
        return len(self.token_ids)

    @property
    def tokens(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True, eq=False)
class Choice(Generic[Target]):
    """The inputs of the next pass.

    Attributes:
        inputs: in the order of the queue, at least one.
        overtaken: inputs that stay in the queue although they stand before the last chosen one.
        full: whether the budget excluded an input, so that inputs which arrive later cannot join either.
    """

    inputs: list[QueuedInput[Target]]
    overtaken: list[QueuedInput[Target]]
    full: bool
    chosen_at: float = field(default_factory=time.perf_counter)


class _Pass(Generic[Target]):
    """A pass to which inputs are added, within the budgets."""

    def __init__(self, first: QueuedInput[Target], target_tokens: int, max_tokens: int, pads: bool) -> None:
        self.inputs: list[QueuedInput[Target]] = []
        self._target_tokens, self._max_tokens, self._pads = target_tokens, max_tokens, pads
        self._rows = self._peak = self._longest = self._tokens = self._peak_tokens = 0
        self.add(first)

    def fits(self, queued: QueuedInput[Target]) -> bool:
        """Whether the input fits: by its expected rows in the target, by its most rows at once in the maximum."""
        if self._pads:
            longest = max(self._longest, queued.length)
            expected, peak = (self._rows + queued.rows) * longest, (self._peak + queued.rows_at_once) * longest
        else:
            expected, peak = self._tokens + queued.tokens, self._peak_tokens + queued.rows_at_once * queued.length
        return expected <= self._target_tokens and peak <= self._max_tokens

    def padding(self, queued: QueuedInput[Target]) -> int:
        """The tokens of padding that the input would add: its own and those of the other inputs."""
        if not self._pads:
            return 0
        longest = max(self._longest, queued.length)
        return queued.rows * (longest - queued.length) + self._rows * (longest - self._longest)

    def add(self, queued: QueuedInput[Target]) -> None:
        self.inputs.append(queued)
        self._rows += queued.rows
        self._peak += queued.rows_at_once
        self._longest = max(self._longest, queued.length)
        self._tokens += queued.tokens
        self._peak_tokens += queued.rows_at_once * queued.length


def select(
    waiting: Sequence[QueuedInput[Target]],
    target_tokens: int,
    max_tokens: int,
    pads: Callable[[Target], bool],
    shape: Callable[[Target], Hashable] = id,
) -> Choice[Target]:
    """Choose the inputs of the next pass from the waiting inputs.

    The first input always joins, whatever its size; all others must be for an adapter of the same shape. Next come inputs
    that must not be overtaken any more; if one of these does not fit, nothing behind it joins. Of the remaining inputs,
    those closest in length to the first one are preferred, and among equals the earlier ones.

    Args:
        waiting: the queue, sorted by `order`; not empty.
        target_tokens: limit on expected rows x padded length; does not apply to the first input.
        max_tokens: limit on the most rows at once x padded length; `Batcher.check_input` checks every input against it.
        pads: whether passes for this adapter compute padding. If not, real lengths count, and inputs join in order.
        shape: adapters for which it is equal can share a pass; they agree in `pads`.
    """
    first = waiting[0]
    wanted = shape(first.target)
    padded = pads(first.target)
    chosen = _Pass(first, target_tokens, max_tokens, padded)
    full = False
    others: list[QueuedInput[Target]] = []
    for queued in islice(waiting, 1, WINDOW):
        may_join = shape(queued.target) == wanted
        if queued.overtaken < MOST_OVERTAKEN:
            if may_join:
                others.append(queued)
        elif may_join and chosen.fits(queued):
            chosen.add(queued)
        else:
            full = True
            break
    if padded:
        others.sort(key=lambda queued: abs(queued.length - first.length))  # stable: earlier first among equals
    acceptable_padding = FIXED_SHARE * target_tokens
    for queued in others:
        if not chosen.fits(queued):
            full = True
        elif chosen.padding(queued) <= acceptable_padding:
            chosen.add(queued)
    inputs = sorted(chosen.inputs, key=lambda queued: queued.order)
    members, last = set(inputs), inputs[-1].order
    overtaken = [queued for queued in islice(waiting, WINDOW) if queued.order < last and queued not in members]
    return Choice(inputs, overtaken, full)
