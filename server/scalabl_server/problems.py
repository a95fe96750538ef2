"""`ProblemError`: why a request failed, as data (kind, field, advice). `web.errors` turns it into an HTTP response."""

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
    """A request that was refused or that failed.

    Attributes:
        detail: what is wrong and what to change; sent to the client.
        field: the field of the request that is wrong; None if the problem is not a single field.
        retry_after: seconds after which the client may try again; None if a time is not known.
    """

    def __init__(self, kind: Kind, detail: str, *, field: str | None = None, retry_after: float | None = None) -> None:
        self.kind, self.detail, self.field, self.retry_after = kind, detail, field, retry_after
        super().__init__(self.message)

    @property
    def message(self) -> str:
        """The detail, preceded by the field's name if there is one, and shortened if it is long."""
        return shortened(self.detail if self.field is None else f"{self.field}: {self.detail}", LONGEST_MESSAGE)
