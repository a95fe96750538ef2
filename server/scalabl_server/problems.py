"""Errors as RFC 9457 `application/problem+json`: a closed set of kinds, each with a stable slug, and the handlers."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

logger = logging.getLogger("scalabl")

TITLES: dict[str, tuple[int, str]] = {
    "bad-request": (400, "The request is malformed"),
    "unauthorized": (401, "A valid API key is needed"),
    "path-not-allowed": (403, "The path is not allowed"),
    "not-found": (404, "No such resource"),
    "unknown-adapter": (404, "No such adapter"),
    "unknown-prediction": (404, "No such prediction"),
    "outcomes-off": (404, "Predictions are not stored"),
    "method-not-allowed": (405, "The route has no such method"),
    "receive-timeout": (408, "The request took too long to arrive"),
    "adapter-conflict": (409, "The adapters that are loaded stand against it"),
    "body-too-large": (413, "The request body is too large"),
    "input-too-large": (413, "An input is too large"),
    "unsupported-media-type": (415, "The body is not JSON"),
    "invalid-field": (422, "A field is wrong"),
    "invalid-adapter": (422, "The adapter cannot be used"),
    "queue-full": (429, "The queue is full"),
    "headers-too-large": (431, "The request's headers are too large"),
    "client-gone": (499, "The client closed its connection"),
    "internal-error": (500, "The server failed"),
    "out-of-memory": (503, "An input does not fit in memory"),
    "starting": (503, "The server is starting"),
    "draining": (503, "The server is shutting down"),
    "failed": (503, "The server could not load its model"),
    "engine-unavailable": (503, "The engine behind this server does not answer"),
    "outcomes-unavailable": (503, "The outcomes database is down"),
    "stuck": (503, "The server's worker has failed"),
    "deadline-exceeded": (504, "The deadline has passed"),
}


class ProblemError(Exception):
    """An answer that is an error. `slug` is a key of `TITLES`; `detail` says what to change."""

    def __init__(self, slug: str, detail: str, retry_after: float | None = None) -> None:
        if len(detail) > LONGEST_DETAIL:  # it quotes the request, which may be large
            detail = detail[:LONGEST_DETAIL] + "…"
        super().__init__(detail)
        self.slug, self.detail, self.retry_after = slug, detail, retry_after

    def response(self, path: str = "") -> Response:
        """The problem document, or what the Open Inference Protocol wants in its place on that protocol's paths."""
        status, title = TITLES[self.slug]
        headers = {}
        if self.retry_after is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after)))
        if status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.slug in CLOSING:
            headers["connection"] = "close"
        # Escaped to ASCII, so that a lone surrogate quoted from the request cannot break the encoding.
        if path == "/v2" or path.startswith("/v2/"):
            return Response(json.dumps({"error": self.detail}), status, headers, media_type="application/json")
        body = {"type": f"urn:scalabl:problem:{self.slug}", "title": title, "status": status, "detail": self.detail}
        return Response(json.dumps(body), status, headers, media_type="application/problem+json")


CLOSING = ("bad-request", "receive-timeout", "body-too-large", "headers-too-large")  # the rest is not worth reading
UNION_TAGS = ("str", "list[", "object[", "constrained-int", "literal[")
NOT_AN_OBJECT = ("missing", "model_attributes_type")
MOST_ERRORS_TOLD = 8
LONGEST_DETAIL, LONGEST_PATH_SHOWN = 2000, 200  # characters


def field_errors(errors: Sequence[Any]) -> str:
    """pydantic's errors as `field: message`, the branches of a union joined by `or`."""
    messages: dict[str, list[str]] = {}
    for error in errors:
        if error["loc"] == ("body",) and error["type"] in NOT_AN_OBJECT:
            return "body: send a JSON object, with the header 'Content-Type: application/json'"
        parts = [str(part) for part in error["loc"] if part != "body" and not str(part).startswith(UNION_TAGS)]
        field = ".".join(parts)[:LONGEST_PATH_SHOWN] or "body"
        if field not in messages and len(messages) == MOST_ERRORS_TOLD:
            break
        said = messages.setdefault(field, [])
        if error["msg"] not in said:
            said.append(error["msg"])
    return "; ".join(f"{field}: {' or '.join(said)}" for field, said in messages.items())


def unexpected(error: Exception) -> ProblemError:
    """What the client is told of an error that nobody foresaw; the log gets the rest."""
    logger.error("an unexpected error", exc_info=error)
    return ProblemError("internal-error", "an unexpected error; the server's log has it")


def install(app: FastAPI) -> None:
    """Make every error that the application foresees a problem document; the middleware answers the others."""

    @app.exception_handler(ProblemError)
    async def _problem(request: Request, error: ProblemError) -> Response:
        return error.response(request.scope["path"])

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        return ProblemError("invalid-field", field_errors(error.errors())).response(request.scope["path"])

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        path = request.scope["path"]
        shown = path if len(path) <= LONGEST_PATH_SHOWN else path[:LONGEST_PATH_SHOWN] + "…"
        if error.status_code == 404:
            return ProblemError("not-found", f"{shown} is not a route; see /docs").response(path)
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "")
            response = ProblemError("method-not-allowed", f"{shown} takes {allowed}").response(path)
            response.headers["allow"] = allowed
            return response
        if isinstance(error.__cause__, ProblemError):  # raised while FastAPI read the body
            return error.__cause__.response(path)
        return ProblemError("bad-request", str(error.detail)).response(path)
