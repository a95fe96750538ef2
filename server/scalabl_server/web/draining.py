"""Shutdown: what a first and a second SIGTERM do, and when the process may stop listening."""

from __future__ import annotations

import logging
import os
import time
from types import FrameType

import uvicorn
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scalabl_server.lifetime import ServerLifetime

logger = logging.getLogger("scalabl")

FINAL_ANSWER_SECONDS = 2  # for sending the 503 answers to requests that are cut off


class DrainingServer(uvicorn.Server):
    """Keeps listening after SIGTERM until every accepted request is answered; new requests get a 503 meanwhile.

    A second signal ends the process at once, with the exit status of a process killed by that signal.

    Attributes:
        cut_off: whether requests were still unanswered when the grace period ended.

    Args:
        grace: seconds within which running requests must finish.
        delay: seconds to keep listening at least, so that load balancers notice that the server is not ready.
    """

    def __init__(self, config: uvicorn.Config, lifetime: ServerLifetime, grace: float, delay: float) -> None:
        super().__init__(config)
        self.cut_off = False
        self._lifetime, self._grace, self._delay = lifetime, grace, delay
        self._signalled_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._signalled_at is not None:
            os._exit(128 + sig)
        self._signalled_at = time.monotonic()
        self._captured_signals.append(sig)
        self._lifetime.drain()

    async def on_tick(self, counter: int) -> bool:
        if await super().on_tick(counter):
            return True
        if self._signalled_at is None:
            return False
        elapsed = time.monotonic() - self._signalled_at
        if elapsed >= self._grace:
            if self._lifetime.in_flight:
                logger.warning(
                    "%d requests were not answered within the shutdown timeout of %g s",
                    self._lifetime.in_flight,
                    self._grace,
                )
                self.cut_off = True
                await self._lifetime.give_up()
            self.config.timeout_graceful_shutdown = FINAL_ANSWER_SECONDS
            return True
        if self._lifetime.in_flight or elapsed < self._delay:
            return False
        self.config.timeout_graceful_shutdown = max(FINAL_ANSWER_SECONDS, round(self._grace - elapsed))
        return True

    def end(self) -> None:
        """Exit with status 1 if requests were cut off. If a pass still runs, exit at once instead of waiting for it."""
        if self._lifetime.busy:
            logging.shutdown()
            os._exit(int(self.cut_off))
        if self.cut_off:
            raise SystemExit(1)


class CloseWhileDraining:
    """Send `Connection: close` with every answer while the server drains, so that clients reconnect to another replica."""

    def __init__(self, app: ASGIApp, lifetime: ServerLifetime) -> None:
        self._app, self._lifetime = app, lifetime

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def closing(message: Message) -> None:
            if message["type"] == "http.response.start" and self._lifetime.state == "draining":
                MutableHeaders(raw=message.setdefault("headers", []))["connection"] = "close"
            await send(message)

        await self._app(scope, receive, closing)
