"""A client that is cheap beside the server that it measures, and that server: a process of its own.

Raw HTTP over connections that stay open; of an answer only the status is read. The client shares the machine's cores with
the server: what it costs, tens of microseconds a request, is in what it measures.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Answer:
    """One request's end. Times are of `time.perf_counter`; `due` is when it should have been sent, `sent` when it was."""

    number: int
    status: int
    due: float
    sent: float
    ended: float

    @property
    def seconds(self) -> float:
        """From when it was due, so that a late client hides nothing."""
        return self.ended - self.due


class Client:
    """Posts to `/predict`, on as many connections as requests are open at once."""

    def __init__(self, port: int, bodies: Sequence[dict[str, object]], **headers: str) -> None:
        self._port, self._idle = port, list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]()
        lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        self._requests = []
        for number, body in enumerate(bodies):
            content = json.dumps(body).encode()
            head = (
                f"POST /predict HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n{lines}"
                f"x-request-id: load-{number}\r\ncontent-length: {len(content)}\r\n\r\n"
            )
            self._requests.append(head.encode() + content)

    async def ask(self, number: int, due: float | None = None) -> Answer:
        """Send the body of this number and wait for its answer."""
        sent = time.perf_counter()
        reader, writer = self._open() or await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(self._requests[number % len(self._requests)])
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
        await reader.readexactly(length)
        ended = time.perf_counter()
        if b"connection: close" in head:
            writer.close()
        else:
            self._idle.append((reader, writer))
        return Answer(number, int(head[9:12]), sent if due is None else due, sent, ended)

    def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        """A connection that nobody uses and the server has not closed; it closes those that are idle for seconds."""
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof():
                return reader, writer
            writer.close()
        return None

    async def close(self) -> None:
        """Close the connections."""
        for _, writer in self._idle:
            writer.close()
            await writer.wait_closed()
        self._idle.clear()

    async def one_by_one(self, numbers: Sequence[int]) -> list[Answer]:
        """Each request once the one before is answered."""
        answers = [await self.ask(number) for number in numbers]
        await self.close()
        return answers

    async def at_once(self, count: int) -> list[Answer]:
        """All requests together, which keeps the server saturated until the last of them."""
        answers = await asyncio.gather(*(self.ask(number) for number in range(count)))
        await self.close()
        return answers

    async def by(self, clients: int, numbers: Sequence[int]) -> list[Answer]:
        """So many clients, each of which asks again as soon as it is answered."""
        left, answers = iter(numbers), list[Answer]()

        async def client() -> None:
            for number in left:
                answers.append(await self.ask(number))

        await asyncio.gather(*(client() for _ in range(clients)))
        await self.close()
        return answers

    async def open_loop(self, after: Sequence[float]) -> list[Answer]:
        """A request each so many seconds after the beginning, whatever becomes of those before."""
        began, tasks = time.perf_counter(), []
        for number, seconds in enumerate(after):
            await asyncio.sleep(max(0.0, began + seconds - time.perf_counter()))
            tasks.append(asyncio.create_task(self.ask(number, began + seconds)))
        answers = await asyncio.gather(*tasks)
        await self.close()
        return answers


@dataclass(frozen=True)
class Server:
    """A server that is ready. `log`: its standard error, one JSON object a line."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def requests(self) -> list[dict[str, object]]:
        """The log's lines about predictions."""
        lines = [json.loads(line) for line in self.log.read_text(encoding="utf-8").splitlines() if line.startswith("{")]
        return [line for line in lines if line.get("route") == "/predict"]

    def get(self, path: str) -> bytes:
        """The body of an answer."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as response:
            content: bytes = response.read()
        return content

    def rss(self) -> int:
        """Resident bytes."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def serving(folder: Path, seconds: float = 300, **settings: object) -> Iterator[Server]:
    """`scalabl serve` with these settings, until the context ends. What it keeps and says lies in `folder`.

    Raises:
        RuntimeError: it has ended, or is not ready in so many seconds.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    flags = {"port": port, "data_dir": folder, "log_format": "json"} | settings
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SCALABL_")}
    log = folder / "server.log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "scalabl_server.cli", "serve", *arguments], stderr=errors, env=environment
        )
    server = Server(process, port, log)
    try:
        deadline = time.monotonic() + seconds
        while not _is_ready(server):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server is not ready; its log says:\n{log.read_text(encoding='utf-8')[-3000:]}")
            time.sleep(0.1)
        yield server
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    finally:
        process.kill()
        process.wait()


def _is_ready(server: Server) -> bool:
    try:
        server.get("/health/ready")
    except (urllib.error.URLError, OSError):
        return False
    return True
