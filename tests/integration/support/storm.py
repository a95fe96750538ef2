"""A client for storms: raw HTTP over asyncio sockets, so that the client costs little of the machine that it measures."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answer:
    """One request's end. `status` is None when the connection failed or closed without an answer; times are monotonic."""

    status: int | None
    began: float
    ended: float
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    @property
    def problem(self) -> str:
        """The slug of a problem document."""
        return str(json.loads(self.body)["type"]).rpartition(":")[2]


async def post(port: int, body: dict[str, Any], path: str = "/predict", **headers: str) -> Answer:
    """One request on a connection of its own."""
    content = json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "host: 127.0.0.1", "content-type: application/json", "connection: close"]
    lines += [f"content-length: {len(content)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    began = time.monotonic()
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return Answer(None, began, time.monotonic())
    try:
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + content)
        raw = await reader.read()
    except OSError:
        return Answer(None, began, time.monotonic())
    finally:
        writer.close()
    ended = time.monotonic()
    head, _, answer = raw.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 "):
        return Answer(None, began, ended)
    status, *fields = head.decode("latin-1").split("\r\n")
    pairs = (line.split(": ", 1) for line in fields)
    return Answer(int(status.split()[1]), began, ended, {name.lower(): value for name, value in pairs}, answer)


async def closed_loop(port: int, clients: int, seconds: float, make: Callable[[int], dict[str, Any]]) -> list[Answer]:
    """So many clients, each of which asks again as soon as it is answered."""
    until = time.monotonic() + seconds
    answers: list[Answer] = []

    async def client(number: int) -> None:
        while time.monotonic() < until:
            answers.append(await post(port, make(number)))

    await asyncio.gather(*(client(number) for number in range(clients)))
    return answers


async def open_loop(
    port: int, per_second: float, seconds: float, make: Callable[[int], dict[str, Any]], **headers: str
) -> list[Answer]:
    """Requests at a steady rate, whatever becomes of the ones before; returns when the last one has ended."""
    started = time.monotonic()
    tasks = []
    for number in range(round(per_second * seconds)):
        await asyncio.sleep(max(0.0, started + number / per_second - time.monotonic()))
        tasks.append(asyncio.create_task(post(port, make(number), **headers)))
    return list(await asyncio.gather(*tasks))
