"""Cancelling a request's work when its client disconnects, and the header with which a client limits its waiting time."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Annotated, Any, TypeVar

from fastapi import Header, Request

from scalabl_server.problems import ProblemError

Answer = TypeVar("Answer")

RequestTimeout = Annotated[
    float | None,
    Header(
        gt=0,
        allow_inf_nan=False,
        description="Deadline of this request in seconds (default and maximum: the server's request timeout).",
    ),
]


async def while_connected(request: Request, work: Coroutine[Any, Any, Answer]) -> Answer:
    """The result of `work`, which is cancelled as soon as the client closes its connection.

    Call it only after the request's body has been read: then the only message that can still arrive is the disconnect.

    Raises:
        ProblemError: `client-gone`, which only the log and the metrics see.
    """
    task = asyncio.current_task()
    assert task is not None  # a coroutine runs in one
    disconnected = finished = False

    def cancel_work(watcher: asyncio.Future[None]) -> None:
        nonlocal disconnected
        if watcher.cancelled():
            return
        watcher.exception()  # mark it as seen; whatever it was, the client cannot be answered any more
        if not finished:
            disconnected = True
            task.cancel()

    watcher = asyncio.ensure_future(_wait_for_disconnect(request))
    watcher.add_done_callback(cancel_work)
    try:
        return await work
    except asyncio.CancelledError:
        if disconnected and task.uncancel() == 0:  # otherwise the server has cancelled the task as well
            raise ProblemError("client-gone", "the client closed its connection before the answer was ready") from None
        raise
    finally:
        finished = True
        watcher.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
