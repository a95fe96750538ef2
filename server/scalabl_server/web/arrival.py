"""ASGI middleware that limits the size of headers and body and the time for the body, and refuses ambiguous requests."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from scalabl_server.problems import ProblemError
from scalabl_server.web import errors


class ArrivalLimits:
    """Refuse a request that is too large, too slow or ambiguous, as soon as that is known.

    Args:
        max_header_bytes: limit on the path and all header lines together.
        max_body_bytes: limit on the declared length of the body, and on the bytes that arrive.
        body_timeout: seconds within which the whole body must arrive.
    """

    def __init__(self, app: ASGIApp, max_header_bytes: int, max_body_bytes: int, body_timeout: float) -> None:
        self._app = app
        self._max_header_bytes, self._max_body_bytes, self._body_timeout = max_header_bytes, max_body_bytes, body_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await errors.answer(refusal, scope["path"])(scope, receive, send)
            return
        received, complete = 0, False
        deadline = asyncio.get_running_loop().time() + self._body_timeout

        async def limited() -> Message:
            nonlocal received, complete
            if complete:  # the only message left to wait for is the client's disconnect
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise ProblemError(
                    "receive-timeout",
                    f"only {received} bytes of the body arrived within {self._body_timeout:g} s; send it in that time",
                ) from None
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > self._max_body_bytes:
                raise self._too_large(received)
            return message

        await self._app(scope, limited, send)

    def _refusal(self, scope: Scope) -> ProblemError | None:
        size = sum(len(name) + len(value) + 4 for name, value in scope["headers"]) + len(scope.get("raw_path", b""))
        if size > self._max_header_bytes:
            return ProblemError(
                "headers-too-large",
                f"path and headers have {size} bytes and the limit is {self._max_header_bytes}; send fewer headers",
            )
        if scope["http_version"] not in ("1.0", "1.1"):
            return ProblemError("bad-request", f"HTTP {scope['http_version']} is not supported; use HTTP 1.1")
        headers = dict(scope["headers"])
        declared = headers.get(b"content-length", b"")
        if b"transfer-encoding" in headers and declared:  # request smuggling: two proxies could see different body ends
            return ProblemError("bad-request", "both Content-Length and Transfer-Encoding were sent; send one of them")
        if declared.isdigit() and int(declared) > self._max_body_bytes:
            return self._too_large(int(declared))
        return None

    def _too_large(self, size: int) -> ProblemError:
        return ProblemError(
            "body-too-large",
            f"the body has at least {size} bytes and the limit is {self._max_body_bytes}; send fewer inputs",
        )
