"""One client, one request after the other: what the server adds to the time of the pass. Other loads are beside it."""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.load.client import Client, expect_statuses
from benchmarks.processes.server import Server
from benchmarks.report import Line
from benchmarks.timing import spread


def one_client(server: Server, bodies: Sequence[dict[str, object]], line: Line) -> dict[str, Any]:
    """Wall times of one client, and beside each what the pass took by the server's log."""
    client = Client(server.port, bodies)
    known, warm = len(server.requests()), min(3, len(bodies))
    asyncio.run(client.one_by_one(range(warm)))  # the first ones meet cold caches
    commits = _commits(server)
    answers = asyncio.run(client.one_by_one(range(len(bodies))))
    committing, count = (after - earlier for after, earlier in zip(_commits(server), commits, strict=True))
    expect_statuses(answers, {200})
    deadline = time.monotonic() + 10  # a line may come after its answer
    while len(logged := server.requests()[known + warm :]) < len(answers) and time.monotonic() < deadline:
        time.sleep(0.05)
    rows = list(zip(answers, logged, strict=True))  # one after the other, so the order is the same
    stages = ("tokenization_seconds", "queue_seconds", "inference_seconds")
    inference = [float(str(row["inference_seconds"])) for _, row in rows]
    added = [answer.seconds - seconds for (answer, _), seconds in zip(rows, inference, strict=True)]
    inside = [float(str(row["seconds"])) - seconds for (_, row), seconds in zip(rows, inference, strict=True)]
    result = {
        "wall": spread([answer.seconds for answer, _ in rows]),
        "added": spread(added),
        "added_inside": spread(inside),
        "commit_mean": committing / count if count else None,
        "bare_sync": spread(bare_syncs(server.log.parent)) if count else None,
        "stages": {name: spread([float(str(row[name])) for _, row in rows]) for name in stages},
    }
    median = {name: 1000 * result["stages"][name]["median"] for name in stages}
    storing = "the server stores nothing"
    if count:
        storing = (
            f"storing the prediction {1000 * result['commit_mean']:.2f} (mean; a bare fdatasync there takes "
            f"{1000 * result['bare_sync']['median']:.2f})"
        )
    line(
        f"one client, {len(rows)} requests: {1000 * result['wall']['median']:.1f} ms (median), of which the pass "
        f"{median['inference_seconds']:.1f}; the server adds {1000 * result['added']['median']:.2f} ms (95%: "
        f"{1000 * result['added']['p95']:.2f}): {1000 * result['added_inside']['median']:.2f} of them by its own clock, "
        f"among them tokenising {median['tokenization_seconds']:.2f} and the way to the model's thread "
        f"{median['queue_seconds']:.2f}; {storing}; the rest is sockets, parsing and the client"
    )
    return result


def bare_syncs(folder: Path, count: int = 40) -> list[float]:
    """Seconds of an fdatasync after a write of one page, at odd times: a disk may answer at even ones."""
    chance, seconds = random.Random(0), list[float]()
    with tempfile.TemporaryFile(dir=folder) as file:
        for number in range(count):
            time.sleep(chance.uniform(0.02, 0.04))
            began = time.perf_counter()
            os.pwrite(file.fileno(), os.urandom(4096), 4096 * number)
            os.fdatasync(file.fileno())
            seconds.append(time.perf_counter() - began)
    return seconds


def _commits(server: Server) -> tuple[float, float]:
    """(seconds, number) of commits to the outcomes database, which every answer waits for."""
    name = "scalabl_outcomes_commit_duration_seconds"
    values = dict(line.rsplit(" ", 1) for line in server.get("/metrics").decode().splitlines())
    return float(values[f"{name}_sum"]), float(values[f"{name}_count"])
