"""ASGI middleware for two kinds of request line that HTTP demands and no route declares: HEAD, and a URL as the target."""

from __future__ import annotations

import re
from urllib.parse import unquote

from starlette.types import ASGIApp, Message, Receive, Scope, Send

# The target of a request in absolute form, without its query (RFC 9112, section 3.2.2): authority and path.
ABSOLUTE = re.compile(rb"https?://([^/?#]*)(/[^?#]*)?", re.IGNORECASE)


class RequestLine:
    """Turn a request line into the form that routes know.

    HEAD is answered as GET would be, without the body (RFC 9110, section 9.3.2). The target `http://host/path`, which
    proxies may send, means `/path`; its host replaces the header Host, as RFC 9112 demands.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        _use_origin_form(scope)
        if scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        # The same scope, so that the route is known to the middleware outside; it sees HEAD again afterwards.
        scope["method"] = "GET"
        try:
            await self._app(scope, receive, without_body)
        finally:
            scope["method"] = "HEAD"


def _use_origin_form(scope: Scope) -> None:
    absolute = ABSOLUTE.fullmatch(scope.get("raw_path") or b"")
    if absolute is None:
        return
    authority, path = absolute[1].rpartition(b"@")[2], absolute[2] or b"/"
    scope["raw_path"], scope["path"] = path, unquote(path.decode("ascii"))
    scope["headers"] = [(b"host", authority), *((name, value) for name, value in scope["headers"] if name != b"host")]
