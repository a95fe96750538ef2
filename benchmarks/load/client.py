"""A client that costs little beside the server that it measures. Starting that server is in `benchmarks.processes`.

Raw HTTP over connections that stay open; of an answer only the status is read. The client shares the machine's cores with
the server: what it costs, tens of microseconds a request, is in what it measures.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass


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


def expect_statuses(answers: Sequence[Answer], allowed: set[int]) -> None:
    """Raise a RuntimeError if any answer has another status."""
    counts = Counter(answer.status for answer in answers)
    if not set(counts) <= allowed:
        raise RuntimeError(f"answers other than {sorted(allowed)}: {dict(counts)}")
