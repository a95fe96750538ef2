"""The end of a server's life: what SIGTERM and a second one do, and when the process may stop listening."""

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

LAST_WORDS_SECONDS = 2  # for writing the answers that say that time is up


class DrainingServer(uvicorn.Server):
    """Keeps listening after SIGTERM until all that it has accepted is answered, so that newcomers get a 503 that says so.

    A second signal ends the process at once, with the status of a process that the signal killed.

    Attributes:
        cut_off: whether requests were still unanswered when the grace period ended.

    Args:
        grace: seconds that running requests get.
        delay: seconds to stay open at least, for load balancers to notice that the server is not ready.
    """

    def __init__(self, config: uvicorn.Config, lifetime: ServerLifetime, grace: float, delay: float) -> None:
        super().__init__(config)
        self.cut_off = False
        self._lifetime, self._grace, self._delay = lifetime, grace, delay
        self._told_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._told_at is not None:
            os._exit(128 + sig)
        self._told_at = time.monotonic()
        self._captured_signals.append(sig)
        self._lifetime.drain()

    async def on_tick(self, counter: int) -> bool:
        if await super().on_tick(counter):
            return True
        if self._told_at is None:
            return False
        elapsed = time.monotonic() - self._told_at
        if elapsed >= self._grace:
            if self._lifetime.in_flight:
                logger.warning("%d requests were not answered within %g s", self._lifetime.in_flight, self._grace)
                self.cut_off = True
                await self._lifetime.give_up()
            self.config.timeout_graceful_shutdown = LAST_WORDS_SECONDS
            return True
        if self._lifetime.in_flight or elapsed < self._delay:
            return False
        self.config.timeout_graceful_shutdown = max(LAST_WORDS_SECONDS, round(self._grace - elapsed))
        return True

    def end(self) -> None:
        """End the process, when a pass that nobody waits for would keep it; status 1 when requests were cut off."""
        if self._lifetime.busy:
            logging.shutdown()
            os._exit(int(self.cut_off))
        if self.cut_off:
            raise SystemExit(1)


class CloseWhileDraining:
    """Ask clients to close their connection with each answer while the server drains: the next one goes elsewhere."""

    def __init__(self, app: ASGIApp, lifetime: ServerLifetime) -> None:
        self._app, self._lifetime = app, lifetime

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def closing(message: Message) -> None:
            if message["type"] == "http.response.start" and self._lifetime.state == "draining":
                MutableHeaders(raw=message.setdefault("headers", []))["connection"] = "close"
            await send(message)

        await self._app(scope, receive, closing)
