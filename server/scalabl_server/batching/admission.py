"""Admission control: limits the queue by inputs, tokens and expected waiting time, before any work is done."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from scalabl_server.batching.row_demand import RowDemand
from scalabl_server.observe.metrics import Metrics, Reason
from scalabl_server.problems import ProblemError

HEADROOM = 0.5  # a request is refused if its expected wait exceeds this share of the time to its deadline; speed varies
SMOOTHING = 0.1  # weight of the newest pass in the running means


class Place:
    """The place of one input in the queue, from its request's admission until its pass begins or it is cancelled.

    `tokens` (rows x length) is an estimate until the prompt is tokenised. `priority`: lower runs earlier.
    """

    def __init__(self, admission: Admission, tokens: int, priority: int) -> None:
        self._admission, self.tokens, self.priority, self._held = admission, tokens, priority, True

    def free(self) -> None:
        """Release the place. Calling it again has no effect."""
        if self._held:
            self._held = False
            self._admission.change(-1, -self.tokens, self.priority)

    def resize(self, tokens: int) -> None:
        """Replace the estimated tokens by their real number."""
        if self._held:
            self._admission.change(0, tokens - self.tokens, self.priority)
        self.tokens = tokens


class Admission:
    """Counts the inputs and tokens in the queue, and refuses requests that do not fit or would not be answered in time.

    Args:
        max_inputs, max_tokens: limits of the queue.
    """

    def __init__(self, max_inputs: int, max_tokens: int, metrics: Metrics) -> None:
        self.max_inputs, self.max_tokens, self._metrics = max_inputs, max_tokens, metrics
        metrics.queue_limit_inputs.set(max_inputs)
        metrics.queue_limit_tokens.set(max_tokens)
        self.inputs = self.tokens = 0
        self.running_tokens = 0  # of the pass that runs now
        self._tokens_at = Counter[int]()  # priority -> waiting tokens
        self._pass_seconds = self._pass_tokens = 0.0  # running means over passes
        self._share_taken: dict[str, float] = {}  # `RowDemand.learned_as` -> mean share of the most rows that inputs took

    def enter(self, tokens: Sequence[int], seconds_left: float, priority: int = 0) -> list[Place]:
        """Admit a request: a place for each of its inputs, or an error for all.

        Args:
            tokens: the estimated tokens of each input.
            seconds_left: until the request's deadline.
            priority: of the request; inputs with a higher number do not count into its expected wait.

        Raises:
            ProblemError: `queue-full` with a time after which to retry, or `input-too-large` if it never fits.
        """
        self._check_size(len(tokens), sum(tokens))
        self._check_room(len(tokens), sum(tokens))
        wait = self.expected_wait(self._ahead_of(priority))
        if wait > HEADROOM * seconds_left:
            raise self._full(
                "wait",
                f"the requests in the queue need about {wait:.1f} s more, which is too long for this request's deadline of "
                f"{seconds_left:g} s",
            )
        self.change(len(tokens), sum(tokens), priority)
        return [Place(self, count, priority) for count in tokens]

    def settle(self, places: Sequence[Place], tokens: Sequence[int]) -> None:
        """Check a request again and correct its places, once its tokens are counted.

        Raises:
            ProblemError: as `enter`.
        """
        grown = sum(tokens) - sum(place.tokens for place in places)
        self._check_size(len(tokens), sum(tokens))
        if grown > 0:
            self._check_room(0, grown)
        for place, count in zip(places, tokens, strict=True):
            place.resize(count)

    def change(self, inputs: int, tokens: int, priority: int) -> None:
        """Add to the counts of the queue. Only `Place` and `enter` call it."""
        self.inputs += inputs
        self.tokens += tokens
        self._tokens_at[priority] += tokens
        if not self._tokens_at[priority]:
            del self._tokens_at[priority]  # otherwise the table would grow with every new priority
        self._metrics.queue_inputs.set(self.inputs)
        self._metrics.queue_tokens.set(self.tokens)

    def observe_pass(self, tokens: int, seconds: float) -> None:
        """Update the mean speed: a pass over `tokens` tokens, without padding, took `seconds`."""
        self._pass_tokens += SMOOTHING * (tokens - self._pass_tokens)
        self._pass_seconds += SMOOTHING * (seconds - self._pass_seconds)

    def observe_rows(self, demand: RowDemand, taken: int) -> None:
        """Update the mean share of rows: an input with this demand took `taken` rows."""
        if demand.learned_as is not None:
            share = self._share_taken.setdefault(demand.learned_as, 1.0)
            self._share_taken[demand.learned_as] = share + SMOOTHING * (taken / demand.most - share)

    def expected_rows(self, demand: RowDemand) -> int:
        """The rows that an input is expected to take, learned from earlier inputs; the maximum before there are any."""
        if demand.learned_as is None:
            return demand.most
        return max(demand.least, math.ceil(demand.most * self._share_taken.get(demand.learned_as, 1.0)))

    def expected_wait(self, tokens: int) -> float:
        """The seconds that computing this many tokens is expected to take; 0 before the first pass."""
        return tokens * self._pass_seconds / self._pass_tokens if self._pass_tokens else 0.0

    def _ahead_of(self, priority: int) -> int:
        return self.running_tokens + sum(tokens for level, tokens in self._tokens_at.items() if level <= priority)

    def _check_size(self, inputs: int, tokens: int) -> None:
        if inputs > self.max_inputs:
            raise ProblemError(
                "input-too-large",
                f"{inputs} inputs never fit in the queue of {self.max_inputs} inputs; send fewer at once",
                field="inputs",
            )
        if tokens > self.max_tokens:
            raise ProblemError(
                "input-too-large",
                f"about {tokens} tokens (inputs x samples x length) never fit in the queue of {self.max_tokens} tokens; "
                "send fewer inputs at once or lower num_samples",
                field="inputs",
            )

    def _check_room(self, inputs: int, tokens: int) -> None:
        if self.inputs + inputs > self.max_inputs:
            raise self._full(
                "inputs",
                f"{self.inputs} inputs wait and the queue is limited to {self.max_inputs}; this request has {inputs}",
            )
        if self.tokens + tokens > self.max_tokens:
            raise self._full(
                "tokens",
                f"{self.tokens} tokens (inputs x samples x length) wait and the queue is limited to {self.max_tokens}; "
                f"this request adds about {tokens}",
            )

    def _full(self, reason: Reason, detail: str) -> ProblemError:
        self._metrics.rejected.labels(reason).inc()
        wait = self.expected_wait(self.tokens + self.running_tokens)
        return ProblemError("queue-full", f"{detail}. Try again later, or send fewer inputs", retry_after=wait)
