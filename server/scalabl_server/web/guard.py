"""The class of all routes: it checks the API key before the body is read, parses the body strictly, documents errors."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from starlette.datastructures import Headers

from scalabl_server.problems import Kind
from scalabl_server.schemas.problem import Problem
from scalabl_server.web import strict_json
from scalabl_server.web.auth import SCHEMES, KeyRing
from scalabl_server.web.errors import STATUSES

# The problems that can occur on any route, on a route that needs a key, and on a route that reads a body.
ANY: tuple[Kind, ...] = ("bad-request", "receive-timeout", "body-too-large", "headers-too-large", "internal-error")
GUARDED: tuple[Kind, ...] = ("unauthorized",)
BODY: tuple[Kind, ...] = ("unsupported-media-type", "invalid-field")


def documented(
    *kinds: Kind, model: type[BaseModel] = Problem, media_type: str = "application/problem+json"
) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI entries for these errors of a route, by status."""
    entries: dict[int | str, dict[str, Any]] = {}
    for kind in kinds:
        status, title = STATUSES[kind]
        entries.setdefault(status, {"description": title, "content": {media_type: {"schema": model.model_json_schema()}}})
    return entries


def route_class(
    keys: KeyRing,
    before_body: Callable[[Headers], None] | None = None,
    model: type[BaseModel] = Problem,
    media_type: str = "application/problem+json",
) -> type[APIRoute]:
    """The class for a router's routes.

    Args:
        before_body: checks the headers before the body is read; raises `ProblemError` to refuse the request.
        model, media_type: the form of the routes' errors, for OpenAPI.
    """

    class Route(APIRoute):
        def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
            guarded = any(dependency in SCHEMES for dependency in options.get("dependencies") or [])
            has_body = bool({"POST", "PUT", "PATCH"} & set(options.get("methods") or []))
            kinds = ANY + (GUARDED if guarded else ()) + (BODY if has_body else ())
            own = options.pop("responses", None) or {}
            super().__init__(
                path, endpoint, responses=documented(*kinds, model=model, media_type=media_type) | own, **options
            )

        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            handle = super().get_route_handler()
            guarded = any(dependency in SCHEMES for dependency in self.dependencies)
            has_body = self.body_field is not None

            async def handler(request: Request) -> Response:
                if guarded:
                    keys.check(request)
                if has_body:
                    if before_body is not None:
                        before_body(request.headers)
                    strict_json.check_content_type(request.headers)
                    request = StrictRequest(request.scope, request.receive)
                return await handle(request)

            return handler

    return Route


class StrictRequest(Request):
    """A request whose JSON is parsed by `strict_json`."""

    async def json(self) -> Any:
        return strict_json.parse(await self.body())
