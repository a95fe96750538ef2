"""Work that is given up when its client goes away; and the header in which a client says how long it will wait."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Annotated, Any, TypeVar

from fastapi import Header, Request

from scalabl_server.problems import ProblemError

Answer = TypeVar("Answer")

RequestTimeout = Annotated[
    float | None,
    Header(gt=0, allow_inf_nan=False, description="Seconds until the answer is of no use; the server's limit is the most."),
]


async def while_connected(request: Request, work: Coroutine[Any, Any, Answer]) -> Answer:
    """The result of `work`, which is cancelled as soon as the client closes its connection.

    Call it once the request's body has been read; what arrives after that is only the client's leaving.

    Raises:
        ProblemError: `client-gone`, which nobody reads any more.
    """
    task = asyncio.current_task()
    assert task is not None  # a coroutine runs in one
    left = over = False

    def leave(watcher: asyncio.Future[None]) -> None:
        nonlocal left
        if watcher.cancelled():
            return
        watcher.exception()  # whatever it was, nobody can be answered any more
        if not over:
            left = True
            task.cancel()

    watcher = asyncio.ensure_future(_gone(request))
    watcher.add_done_callback(leave)
    try:
        return await work
    except asyncio.CancelledError:
        if left and task.uncancel() == 0:  # else the server wants it to end as well
            raise ProblemError("client-gone", "the client closed its connection before the answer") from None
        raise
    finally:
        over = True
        watcher.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
