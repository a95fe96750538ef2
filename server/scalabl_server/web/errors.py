"""Error responses: the status and title of each kind of problem, the headers and JSON of the response, and the handlers.

No other module knows the statuses. A response is RFC 9457 `application/problem+json`; on paths of the Open Inference
Protocol it has that protocol's form.
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
    "unauthorized": (401, "A valid API key is required"),
    "path-not-allowed": (403, "The path is outside the adapter root"),
    "not-found": (404, "There is no such route"),
    "unknown-adapter": (404, "The adapter is not loaded"),
    "unknown-prediction": (404, "The prediction is not stored"),
    "outcomes-off": (404, "The server does not store predictions"),
    "method-not-allowed": (405, "The route does not support this HTTP method"),
    "receive-timeout": (408, "The request took too long to arrive"),
    "adapter-conflict": (409, "The request conflicts with the loaded adapters"),
    "body-too-large": (413, "The request body is too large"),
    "input-too-large": (413, "The inputs are too large"),
    "unsupported-media-type": (415, "The request body is not JSON"),
    "invalid-field": (422, "A field of the request is invalid"),
    "invalid-adapter": (422, "The adapter cannot be used"),
    "queue-full": (429, "The request queue is full"),
    "headers-too-large": (431, "The request's headers are too large"),
    "client-gone": (499, "The client closed its connection"),
    "internal-error": (500, "An unexpected error in the server"),
    "out-of-memory": (503, "The server does not have enough memory"),
    "starting": (503, "The server is starting"),
    "draining": (503, "The server is shutting down"),
    "failed": (503, "The server could not load its model"),
    "engine-unavailable": (503, "The inference engine is not available"),
    "outcomes-unavailable": (503, "The outcomes database is not available"),
    "stuck": (503, "The server's worker has failed or hangs"),
    "deadline-exceeded": (504, "The request's deadline has passed"),
}
# After an error of these kinds the connection closes: the rest of the request is not read.
CLOSING: tuple[Kind, ...] = ("bad-request", "receive-timeout", "body-too-large", "headers-too-large")

UNION_TAGS = ("str", "list[", "object[", "constrained-int", "literal[")
NOT_AN_OBJECT = ("missing", "model_attributes_type")
MOST_ERRORS_SHOWN = 8
LONGEST_PATH_SHOWN = 200  # characters


def answer(problem: ProblemError, path: str = "") -> Response:
    """The HTTP response for a problem, in the form that the path's protocol uses."""
    status, title = STATUSES[problem.kind]
    headers = {}
    if problem.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(problem.retry_after)))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if problem.kind in CLOSING:
        headers["connection"] = "close"
    # `json.dumps` escapes to ASCII, so a lone surrogate quoted from the request cannot break the encoding.
    if path == "/v2" or path.startswith("/v2/"):
        return Response(json.dumps({"error": problem.message}), status, headers, media_type="application/json")
    body = {"type": f"urn:scalabl:problem:{problem.kind}", "title": title, "status": status, "detail": problem.message}
    return Response(json.dumps(body), status, headers, media_type="application/problem+json")


def invalid_fields(errors: Sequence[Any]) -> ProblemError:
    """One `invalid-field` problem for pydantic's errors: `field: message` per field, branches of a union joined by `or`."""
    messages: dict[str, list[str]] = {}
    for error in errors:
        if error["loc"] == ("body",) and error["type"] in NOT_AN_OBJECT:
            return ProblemError(
                "invalid-field", "send a JSON object, with the header 'Content-Type: application/json'", field="body"
            )
        parts = [str(part) for part in error["loc"] if part != "body" and not str(part).startswith(UNION_TAGS)]
        field = ".".join(parts)[:LONGEST_PATH_SHOWN] or "body"
        if field not in messages and len(messages) == MOST_ERRORS_SHOWN:
            break
        branches = messages.setdefault(field, [])
        if error["msg"] not in branches:
            branches.append(error["msg"])
    return ProblemError(
        "invalid-field", "; ".join(f"{field}: {' or '.join(branches)}" for field, branches in messages.items())
    )


def unexpected(error: Exception) -> ProblemError:
    """Log an error that no code expected. The client gets an `internal-error` without its text."""
    logger.error("an unexpected error while answering a request", exc_info=error)
    return ProblemError("internal-error", "an unexpected error; the server's log has the details")


def install(app: FastAPI) -> None:
    """Register the handlers of expected errors. Unexpected ones are answered by the middleware in `observation`."""

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
            return answer(ProblemError("not-found", f"{shown} is not a route of this server; see /docs"), path)
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "")
            if allowed == "GET":
                allowed = "GET, HEAD"  # `request_line` answers HEAD wherever there is a GET
            response = answer(ProblemError("method-not-allowed", f"{shown} supports only {allowed}"), path)
            response.headers["allow"] = allowed
            return response
        if isinstance(error.__cause__, ProblemError):  # raised while FastAPI read the body
            return answer(error.__cause__, path)
        return answer(ProblemError("bad-request", str(error.detail)), path)
