"""Facts about one request while it is served: its ids, the key's name, its size and the time of each stage.

The middleware creates one `RequestTrace` per request. Code that runs for the request gets it with `current()`. Sending
traces to a collector is in `spans`.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field

REQUEST_ID = re.compile(rb"[A-Za-z0-9._~+/=:@-]{1,128}")
TRACEPARENT = re.compile(rb"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.DOTALL)


@dataclass
class Stages:
    """When the stages of a prediction ended, in seconds of `time.perf_counter`; None for stages not reached yet."""

    tokenized: float | None = None
    tokenizing_took: float = 0.0
    taken: float | None = None  # when the first input of the request entered a forward pass
    computed: float | None = None  # when the last input of the request left its forward pass

    def tokenized_in(self, started: float) -> None:
        """Record that tokenisation, begun at `started`, has just ended."""
        self.tokenized = time.perf_counter()
        self.tokenizing_took = self.tokenized - started

    def took(self, start: float, end: float) -> None:
        """Record that an input of the request was in a forward pass from `start` to `end`."""
        self.taken = start if self.taken is None else min(self.taken, start)
        self.computed = end if self.computed is None else max(self.computed, end)

    def seconds(self) -> dict[str, float]:
        """Seconds of `tokenization`, `queue` (until the first input enters a pass), `inference` (until the last leaves)."""
        if self.tokenized is None or self.taken is None or self.computed is None:
            return {}
        queue = max(0.0, self.taken - self.tokenized)
        return {"tokenization": self.tokenizing_took, "queue": queue, "inference": self.computed - self.taken}


@dataclass
class RequestTrace:
    """One request. `key` is the name of its API key, never the key itself."""

    request_id: str = field(default_factory=lambda: f"req-{secrets.token_hex(16)}")
    trace_id: str = field(default_factory=lambda: secrets.token_hex(16))
    span_id: str = field(default_factory=lambda: secrets.token_hex(8))
    parent_id: str | None = None
    sampled: bool = False
    started: float = field(default_factory=time.perf_counter)
    key: str | None = None
    adapter: str | None = None
    inputs: int = 0
    characters: int = 0
    tokens: int = 0
    compute_type: str = "cpu"
    stages: Stages = field(default_factory=Stages)

    @property
    def traceparent(self) -> str:
        return f"00-{self.trace_id}-{self.span_id}-{'01' if self.sampled else '00'}"


_current: ContextVar[RequestTrace | None] = ContextVar("request_trace", default=None)


def current() -> RequestTrace:
    """The trace of the current request; outside of a request, a new trace that nobody reads."""
    return _current.get() or RequestTrace()


def current_or_none() -> RequestTrace | None:
    """The trace of the current request, None outside of a request."""
    return _current.get()


def begin(headers: Iterable[tuple[bytes, bytes]]) -> RequestTrace:
    """Create the trace of a request with these headers and make it the current one.

    The request id is that of the header `x-request-id`, if it occurs once and is one token of at most 128 characters. The
    trace id and parent are those of `traceparent` (W3C Trace Context), if it occurs once and is valid. Otherwise new ids
    are used, as the standard asks.
    """
    ids = [value for name, value in headers if name == b"x-request-id"]
    parents = [value for name, value in headers if name == b"traceparent"]
    trace = RequestTrace()
    if len(ids) == 1 and REQUEST_ID.fullmatch(ids[0]):
        trace.request_id = ids[0].decode("ascii")
    if len(parents) == 1 and (parent := _parse(parents[0])) is not None:
        trace.trace_id, trace.parent_id, trace.sampled = parent
    _current.set(trace)
    return trace


def _parse(traceparent: bytes) -> tuple[str, str, bool] | None:
    """(trace id, parent id, sampled) of a `traceparent` header, None if it is not valid."""
    match = TRACEPARENT.fullmatch(traceparent.strip())
    if match is None:
        return None
    version, trace_id, parent_id, flags, rest = match.groups()
    if version == b"ff" or (version == b"00" and rest) or not int(trace_id, 16) or not int(parent_id, 16):
        return None
    return trace_id.decode("ascii"), parent_id.decode("ascii"), bool(int(flags, 16) & 1)
