"""Which of the inputs that wait go into the next pass: the first one always, and those beside it that waste little padding.

Pure: the queue is `batcher`'s. A pass is thought to cost its rows times its padded length, and a fixed part beside that. An
input joins where the padding that it adds costs less than that fixed part, which a pass of its own would pay again. Where
passes have no padding, inputs go as they came.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, TypeVar

from scalabl_server.batching.admission import Place
from scalabl_server.batching.jobs import Job, Result
from scalabl_server.observe.trace import Stages

Target = TypeVar("Target")  # what a pass runs on: an adapter

PRIORITY_SECONDS = 1.0  # of waiting, that a step of priority is worth
MOST_OVERTAKEN = 4  # passes with later inputs that an input lets go before it
WINDOW = 256  # inputs from the first on that are looked at, so that a long queue costs no more
FIXED_SHARE = 0.05  # of a full pass, what one costs whatever its size; the budget is measured so (`budget.knee`)


@dataclass(eq=False)
class QueuedInput(Generic[Target]):
    """One prompt that waits for its pass. `result` resolves to what the passes give; cancelling it drops the work.

    Attributes:
        rows: that it is expected to take, in one pass or several.
        rows_at_once: the most that one pass holds of it.
        order: (when it came, later by `PRIORITY_SECONDS` for each step of priority; a number that nobody else has).
        deadline: on the clock of `time.perf_counter`.
        overtaken: in how many passes later inputs have gone before it.
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
    """The next pass.

    Attributes:
        inputs: in order, at least one.
        overtaken: those that stand before the last of them and stay.
        full: whether the budget kept others out, so that who comes later can change nothing.
    """

    inputs: list[QueuedInput[Target]]
    overtaken: list[QueuedInput[Target]]
    full: bool
    chosen_at: float = field(default_factory=time.perf_counter)


class _Pass(Generic[Target]):
    """A pass that grows, within the budgets."""

    def __init__(self, first: QueuedInput[Target], target_tokens: int, max_tokens: int, pads: bool) -> None:
        self.inputs: list[QueuedInput[Target]] = []
        self._target_tokens, self._max_tokens, self._pads = target_tokens, max_tokens, pads
        self._rows = self._peak = self._longest = self._tokens = self._peak_tokens = 0
        self.add(first)

    def fits(self, queued: QueuedInput[Target]) -> bool:
        """By the rows that are expected, and by the most that a pass may hold at once."""
        if self._pads:
            longest = max(self._longest, queued.length)
            expected, peak = (self._rows + queued.rows) * longest, (self._peak + queued.rows_at_once) * longest
        else:
            expected, peak = self._tokens + queued.tokens, self._peak_tokens + queued.rows_at_once * queued.length
        return expected <= self._target_tokens and peak <= self._max_tokens

    def padding(self, queued: QueuedInput[Target]) -> int:
        """Tokens of padding that it would add, its own and that of the others."""
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
    waiting: Sequence[QueuedInput[Target]], target_tokens: int, max_tokens: int, pads: Callable[[Target], bool]
) -> Choice[Target]:
    """The next pass of those that wait, which stand in order.

    The first one is in it, whatever its size, and none but those for the same adapter. Then come those that have been
    overtaken as often as may be; what stands behind one of these that cannot come along stays too. Of the rest, those
    nearest to the first one's length are preferred, and among equals those that came first.

    Args:
        pads: whether a pass for this adapter computes padding; without, real length counts, and the order alone.
        target_tokens: bounds expected rows x padded length, but for the first input.
        max_tokens: bounds the rows that one pass may hold, x padded length; `Batcher.check_input` holds every input to it.
    """
    first = waiting[0]
    padded = pads(first.target)
    chosen = _Pass(first, target_tokens, max_tokens, padded)
    full = False
    others: list[QueuedInput[Target]] = []
    for queued in islice(waiting, 1, WINDOW):
        alike = queued.target is first.target
        if queued.overtaken < MOST_OVERTAKEN:
            if alike:
                others.append(queued)
        elif alike and chosen.fits(queued):
            chosen.add(queued)
        else:
            full = True
            break
    if padded:
        others.sort(key=lambda queued: abs(queued.length - first.length))  # stable: first come among equals
    spare = FIXED_SHARE * target_tokens
    for queued in others:
        if not chosen.fits(queued):
            full = True
        elif chosen.padding(queued) <= spare:
            chosen.add(queued)
    inputs = sorted(chosen.inputs, key=lambda queued: queued.order)
    members, last = set(inputs), inputs[-1].order
    overtaken = [queued for queued in islice(waiting, WINDOW) if queued.order < last and queued not in members]
    return Choice(inputs, overtaken, full)
