"""What every request passes through: the limit on body bytes, and the request metrics. Plain ASGI."""

from __future__ import annotations

import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.metrics import Metrics
from server.problems import ProblemError


class BodyLimit:
    """Refuse a body above `limit` bytes, by its declared length or as soon as that much has arrived."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        declared = dict(scope["headers"]).get(b"content-length", b"")
        if declared.isdigit() and int(declared) > self._limit:
            await self._problem(int(declared)).response()(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit:
                raise self._problem(received)
            return message

        await self._app(scope, counted, send)

    def _problem(self, size: int) -> ProblemError:
        return ProblemError(
            "body-too-large", f"the body has {size} bytes or more and the limit is {self._limit}; send fewer inputs"
        )


class RequestMetrics:
    """Count and time requests by the route's pattern, so that unknown paths share one label."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        code = 500

        async def watched(message: Message) -> None:
            nonlocal code
            if message["type"] == "http.response.start":
                code = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            method = scope["method"] if scope["method"] in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE") else "other"
            self._metrics.requests.labels(route, method, str(code)).inc()
            self._metrics.request_duration.labels(route).observe(time.perf_counter() - started)
