"""The outermost ASGI middleware: request ids and response headers, then metrics, a span and a log line per request."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Protocol

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scalabl_server.observe import logs, trace
from scalabl_server.observe.metrics import Metrics
from scalabl_server.observe.trace import RequestTrace
from scalabl_server.problems import ProblemError
from scalabl_server.web import errors

METHODS = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH")
QUIET = ("/health/live", "/health/ready", "/metrics", "/v2/health/live", "/v2/health/ready")
CLIENT_GONE = 499  # nginx's status for a client that disconnected before its answer; only for metrics and log, never sent

SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
}
# FastAPI's /docs page loads Swagger UI from these hosts.
DOCS_POLICY = (
    "default-src 'none'; connect-src 'self'; img-src 'self' data: https://fastapi.tiangolo.com; "
    "script-src 'unsafe-inline' https://cdn.jsdelivr.net; style-src 'unsafe-inline' https://cdn.jsdelivr.net; "
    "frame-ancestors 'none'"
)


class Spans(Protocol):
    """A recorder of OpenTelemetry spans, used when an OTLP endpoint is set."""

    def begin(self, request: RequestTrace) -> None:
        """Called when a request begins; may set its trace ids."""

    def end(self, request: RequestTrace, method: str, route: str, status: int) -> None:
        """Called when the request has been answered."""


class Observe:
    """Give each request its ids and each response its security and timing headers; then record metrics and a log line."""

    def __init__(self, app: ASGIApp, metrics: Metrics, spans: Spans | None = None, https: bool = False) -> None:
        self._app, self._metrics, self._spans = app, metrics, spans
        self._security = SECURITY_HEADERS | ({"strict-transport-security": "max-age=31536000"} if https else {})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = trace.begin(scope["headers"])
        if self._spans is not None:
            self._spans.begin(request)
        code = 500
        started = gone = False

        async def watched() -> Message:
            nonlocal gone
            message = await receive()
            gone = gone or (message["type"] == "http.disconnect" and not started)
            return message

        async def sending(message: Message) -> None:
            nonlocal code, started
            if message["type"] == "http.response.start":
                started, code = True, message["status"]
                self._add_headers(scope, request, message)
            await send(message)

        try:
            await self._app(scope, watched, sending)
        except asyncio.CancelledError:  # the shutdown timeout has passed
            if not started:
                refusal = ProblemError("draining", "the server is shutting down; try another replica", retry_after=5)
                await errors.answer(refusal, scope["path"])(scope, receive, sending)
            raise
        except Exception as error:
            if started:
                raise
            await errors.answer(errors.unexpected(error), scope["path"])(scope, receive, sending)
        finally:
            self._record(scope, request, CLIENT_GONE if gone else code)

    def _add_headers(self, scope: Scope, request: RequestTrace, message: Message) -> None:
        headers = MutableHeaders(raw=message.setdefault("headers", []))
        for name, value in self._security.items():
            headers.setdefault(name, value)
        if scope["path"] == "/docs":
            headers["content-security-policy"] = DOCS_POLICY
        headers["x-request-id"] = request.request_id
        headers["traceparent"] = request.traceparent
        for name, value in _timing_headers(request).items():
            headers[name] = value

    def _record(self, scope: Scope, request: RequestTrace, code: int) -> None:
        elapsed = time.perf_counter() - request.started
        route = getattr(scope.get("route"), "path", "unmatched")
        method = scope["method"] if scope["method"] in METHODS else "other"
        self._metrics.requests.labels(route, method, str(code)).inc()
        self._metrics.request_duration.labels(route).observe(elapsed)
        if request.key is not None:
            self._metrics.key_requests.labels(request.key).inc()
        if self._spans is not None:
            self._spans.end(request, method, route, code)
        client = scope.get("client")
        logs.log_request(
            {
                "request_id": request.request_id,
                "method": method,
                "route": route,
                "path": scope["path"] if route == "unmatched" else None,
                "status": code,
                "seconds": round(elapsed, 6),
                "key": request.key,
                "adapter": request.adapter,
                "inputs": request.inputs or None,
                "tokens": request.tokens or None,
                **{f"{name}_seconds": round(took, 6) for name, took in request.stages.seconds().items()},
                "client": client[0] if client else None,
                "trace_id": request.trace_id,
                "parent_id": request.parent_id,
            },
            level=logging.DEBUG if route in QUIET and code == 200 else logging.INFO,
        )


def _timing_headers(request: RequestTrace) -> dict[str, str]:
    """The headers that text-embeddings-inference sends, times in milliseconds. Empty for a request without computation."""
    stages = request.stages.seconds()
    if not stages:
        return {}
    times = {
        "x-compute-time": stages["tokenization"] + stages["inference"],
        "x-total-time": time.perf_counter() - request.started,
        "x-tokenization-time": stages["tokenization"],
        "x-queue-time": stages["queue"],
        "x-inference-time": stages["inference"],
    }
    return {
        "x-compute-type": request.compute_type,
        "x-compute-characters": str(request.characters),
        "x-compute-tokens": str(request.tokens),
    } | {name: str(round(1000 * seconds)) for name, seconds in times.items()}
