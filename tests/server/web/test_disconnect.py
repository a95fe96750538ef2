"""A client that disconnects, over a real socket: its work is cancelled and its place in the queue is released."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import Request
from scalabl_server.app import create_app
from scalabl_server.lifetime import ServerLifetime
from scalabl_server.problems import ProblemError
from scalabl_server.web.disconnect import while_connected

from tests.server.conftest import Gate, settings_for, wait_until


@contextmanager
def _listening(app: Any) -> Iterator[int]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join(30)


def _send(port: int, **body: Any) -> socket.socket:
    content = json.dumps(body).encode()
    head = f"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(head.encode() + content)
    return connection


def test_a_client_that_leaves_frees_its_place_and_its_work_is_not_done(folders: Path, gate: Gate) -> None:
    app = create_app(settings_for(folders, max_queue=3), load=gate.load)
    server: ServerLifetime = app.state.lifetime
    with _listening(app) as port:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200)
        running = _send(port, inputs="running")
        assert gate.entered.wait(30)
        waiting = _send(port, inputs=["b", "c", "d"])
        wait_until(lambda: server.admission.inputs == 3)
        waiting.close()
        wait_until(lambda: server.admission.inputs == 0)
        other = _send(port, inputs=["e", "f", "g"])
        wait_until(lambda: server.admission.inputs == 3)
        gate.open.set()
        for connection in (running, other):
            assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
            connection.close()
        metrics = httpx.get(f"{url}/metrics").text
        assert 'scalabl_predictions_total{adapter="colours"} 4.0' in metrics, "one running and three of the other"
        assert 'scalabl_requests_total{code="499",method="POST",route="/predict"} 1.0' in metrics


class Wire:
    """A request whose client disconnects on an event, and work that ends on an event; the two events may coincide."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        self.leaving, self.working = loop.create_future(), loop.create_future()
        self.request = Request({"type": "http"}, self._receive)

    async def _receive(self) -> dict[str, str]:
        await self.leaving
        return {"type": "http.disconnect"}

    async def ask(self) -> str:
        async def work() -> str:
            return str(await self.working)

        answer = await while_connected(self.request, work())
        for _ in range(3):
            await asyncio.sleep(0)  # a cancellation that comes late would come here
        return answer


async def _asked(wire: Wire) -> asyncio.Task[str]:
    task = asyncio.ensure_future(wire.ask())
    await asyncio.sleep(0.01)
    return task


def test_work_whose_client_leaves_is_cancelled_and_the_request_goes_on() -> None:
    async def scenario() -> None:
        wire = Wire()
        task = await _asked(wire)
        wire.leaving.set_result(None)
        with pytest.raises(ProblemError, match="closed its connection"):
            await task
        assert wire.working.cancelled()
        assert task.cancelling() == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("leaves_first", [True, False])
def test_a_client_that_leaves_as_the_work_ends_cancels_nothing_that_comes_after(leaves_first: bool) -> None:
    async def scenario() -> None:
        wire = Wire()
        task = await _asked(wire)
        for future in (wire.leaving, wire.working) if leaves_first else (wire.working, wire.leaving):
            future.set_result("done")
        assert await task == "done"

    asyncio.run(scenario())


def test_a_server_that_ends_a_request_is_not_taken_for_a_client_that_leaves() -> None:
    async def scenario() -> None:
        wire = Wire()
        task = await _asked(wire)
        wire.leaving.set_result(None)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())
