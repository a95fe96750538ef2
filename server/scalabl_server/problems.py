"""What a request can be refused for, as data: kind, field, what to change. `web.errors` makes HTTP answers of it."""

from __future__ import annotations

from typing import Literal

from scalabl_server.text import shortened

LONGEST_MESSAGE = 2000  # characters; a message quotes the request, which may be large

Kind = Literal[
    "bad-request",
    "unauthorized",
    "path-not-allowed",
    "not-found",
    "unknown-adapter",
    "unknown-prediction",
    "outcomes-off",
    "method-not-allowed",
    "receive-timeout",
    "adapter-conflict",
    "body-too-large",
    "input-too-large",
    "unsupported-media-type",
    "invalid-field",
    "invalid-adapter",
    "queue-full",
    "headers-too-large",
    "client-gone",
    "internal-error",
    "out-of-memory",
    "starting",
    "draining",
    "failed",
    "engine-unavailable",
    "outcomes-unavailable",
    "stuck",
    "deadline-exceeded",
]


class ProblemError(Exception):
    """A request that cannot be answered as it was meant.

    Attributes:
        detail: what is wrong and what to change, for the client to read.
        field: the field of the request that is wrong, where it is one.
        retry_after: seconds after which another attempt makes sense.
    """

    def __init__(self, kind: Kind, detail: str, *, field: str | None = None, retry_after: float | None = None) -> None:
        self.kind, self.detail, self.field, self.retry_after = kind, detail, field, retry_after
        super().__init__(self.message)

    @property
    def message(self) -> str:
        """The detail, after the field where there is one."""
        return shortened(self.detail if self.field is None else f"{self.field}: {self.detail}", LONGEST_MESSAGE)
