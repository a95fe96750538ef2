"""A client that leaves, over a real socket: its work is dropped and its place is free."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from server.app import create_app
from server.service import Service
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
    service: Service = app.state.service
    with _listening(app) as port:
        url = f"http://127.0.0.1:{port}"
        wait_until(lambda: httpx.get(f"{url}/health/ready").status_code == 200)
        running = _send(port, inputs="running")
        assert gate.entered.wait(30)
        waiting = _send(port, inputs=["b", "c", "d"])
        wait_until(lambda: service.admission.inputs == 3)
        waiting.close()
        wait_until(lambda: service.admission.inputs == 0)
        other = _send(port, inputs=["e", "f", "g"])
        wait_until(lambda: service.admission.inputs == 3)
        gate.open.set()
        for connection in (running, other):
            assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
            connection.close()
        metrics = httpx.get(f"{url}/metrics").text
        assert 'scalabl_predictions_total{adapter="colours"} 4.0' in metrics, "one running and three of the other"
        assert 'scalabl_requests_total{code="499",method="POST",route="/predict"} 1.0' in metrics
