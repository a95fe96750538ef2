"""Errors as HTTP: each kind's status and title, the headers and the JSON of an answer that is an error, and the handlers.

No other module knows these. An answer is RFC 9457 `application/problem+json`; on paths of the Open Inference Protocol it has
that protocol's form.
"""

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

from scalabl_server.problems import Kind, ProblemError
from scalabl_server.text import shortened

logger = logging.getLogger("scalabl")

# kind -> (status, title)
STATUSES: dict[Kind, tuple[int, str]] = {
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
# After these the rest of what the client sends is not worth reading.
CLOSING: tuple[Kind, ...] = ("bad-request", "receive-timeout", "body-too-large", "headers-too-large")

UNION_TAGS = ("str", "list[", "object[", "constrained-int", "literal[")
NOT_AN_OBJECT = ("missing", "model_attributes_type")
MOST_ERRORS_TOLD = 8
LONGEST_PATH_SHOWN = 200  # characters


def answer(problem: ProblemError, path: str = "") -> Response:
    """The response that tells a client of a problem, in the form that is used on this path."""
    status, title = STATUSES[problem.kind]
    headers = {}
    if problem.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(problem.retry_after)))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if problem.kind in CLOSING:
        headers["connection"] = "close"
    # Escaped to ASCII, so that a lone surrogate quoted from the request cannot break the encoding.
    if path == "/v2" or path.startswith("/v2/"):
        return Response(json.dumps({"error": problem.message}), status, headers, media_type="application/json")
    body = {"type": f"urn:scalabl:problem:{problem.kind}", "title": title, "status": status, "detail": problem.message}
    return Response(json.dumps(body), status, headers, media_type="application/problem+json")


def invalid_fields(errors: Sequence[Any]) -> ProblemError:
    """The problem that pydantic's errors are: `field: message` for each field, the branches of a union joined by `or`."""
    messages: dict[str, list[str]] = {}
    for error in errors:
        if error["loc"] == ("body",) and error["type"] in NOT_AN_OBJECT:
            return ProblemError(
                "invalid-field", "send a JSON object, with the header 'Content-Type: application/json'", field="body"
            )
        parts = [str(part) for part in error["loc"] if part != "body" and not str(part).startswith(UNION_TAGS)]
        field = ".".join(parts)[:LONGEST_PATH_SHOWN] or "body"
        if field not in messages and len(messages) == MOST_ERRORS_TOLD:
            break
        branches = messages.setdefault(field, [])
        if error["msg"] not in branches:
            branches.append(error["msg"])
    return ProblemError("invalid-field", "; ".join(f"{field}: {' or '.join(told)}" for field, told in messages.items()))


def unexpected(error: Exception) -> ProblemError:
    """What the client is told of an error that nobody foresaw; the log gets the rest."""
    logger.error("an unexpected error", exc_info=error)
    return ProblemError("internal-error", "an unexpected error; the server's log has it")


def install(app: FastAPI) -> None:
    """Have the application answer every error that it foresees in this form; the middleware answers the others."""

    @app.exception_handler(ProblemError)
    async def _problem(request: Request, error: ProblemError) -> Response:
        return answer(error, request.scope["path"])

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        return answer(invalid_fields(error.errors()), request.scope["path"])

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        path = request.scope["path"]
        shown = shortened(path, LONGEST_PATH_SHOWN)
        if error.status_code == 404:
            return answer(ProblemError("not-found", f"{shown} is not a route; see /docs"), path)
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "")
            response = answer(ProblemError("method-not-allowed", f"{shown} takes {allowed}"), path)
            response.headers["allow"] = allowed
            return response
        if isinstance(error.__cause__, ProblemError):  # raised while FastAPI read the body
            return answer(error.__cause__, path)
        return answer(ProblemError("bad-request", str(error.detail)), path)
