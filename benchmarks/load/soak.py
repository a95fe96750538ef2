"""The server's memory over many requests to a model too small to hide what the server itself holds. No latencies here."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.load.client import Client, expect_statuses
from benchmarks.load.workload import request_bodies
from benchmarks.processes.server import serving
from benchmarks.random_model import write_random_models
from benchmarks.report import Line

CLIENTS = 8
SETTLING = 1000  # requests before the first look at the memory, and between looks


def soak(count: int, line: Line) -> dict[str, Any]:
    """The server's resident memory after the first thousand requests and after the last."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_random_models(folder / "base", folder / "adapter")
        settings = {"model": folder / "base", "adapter": folder / "adapter", "device": "cpu", "warmup": "quick"}
        with serving(folder, **settings, log_level="warning", threads=1) as server:
            client = Client(server.port, request_bodies(500))
            began, memory = time.perf_counter(), list[tuple[int, int]]()
            for start in range(0, count, SETTLING):
                numbers = range(start, min(count, start + SETTLING))
                expect_statuses(asyncio.run(client.by(CLIENTS, numbers)), {200})
                memory.append((numbers.stop, server.rss()))
            seconds = time.perf_counter() - began
    first, last = memory[0][1], memory[-1][1]
    line(
        f"\nsoak, {count} requests to a tiny random model by {CLIENTS} clients in {seconds:.0f} s: "
        f"{first / 2**20:.1f} MiB after {memory[0][0]}, {last / 2**20:.1f} MiB at the end, {last / first - 1:+.2%}"
    )
    return {"requests": count, "seconds": seconds, "rss": memory, "growth": last / first - 1}
