"""An hour at 80% of capacity with adapters loaded and unloaded: no error, and memory, files and threads stay flat.

The capacity is that of the moment: measured anew each minute, for six seconds, and at once when so many requests are
unanswered as 80% never leaves, so that a machine that others use as well makes the load smaller and not the server
overloaded.

`make soak`; SOAK_SECONDS shortens it. Prints one line a minute and a summary, so that a failed run says where it went.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests import tiny
from tests.integration.support.process import Served, served, write_models
from tests.integration.support.storm import Answer, post

pytestmark = pytest.mark.soak

SECONDS = float(os.environ.get("SOAK_SECONDS", "3600"))
LOAD = 0.8
PROBE, ROUND = 6.0, 60.0  # seconds of each round at full capacity, to measure it, and of the round in all
CLIENTS = 16  # that keep the worker busy; more would only wait
UNANSWERED = 4 * CLIENTS
SETTLING = 1000  # requests after which memory is compared with
WORDS = (
    "please",
    "move",
    "my",
    "savings",
    "to",
    "another",
    "account",
    "before",
    "next",
    "week",
    "or",
    "cancel",
    "the",
    "card",
)


@dataclass
class Sample:
    """The resources of the process at one time."""

    at: float
    answered: int
    rss: int
    files: int
    threads: int


@dataclass
class Soak:
    """The requests that were sent, and their answers."""

    statuses: Counter[tuple[str, int | None]] = field(default_factory=Counter)
    unexpected: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    capacities: list[float] = field(default_factory=list)  # predictions per second, one for each round

    def count(self, kind: str, answer: Answer, expected: tuple[int, ...] = (200,)) -> None:
        self.statuses[kind, answer.status] += 1
        if answer.status not in expected and len(self.unexpected) < 20:
            self.unexpected.append(f"{kind}: {answer.status} {answer.body[:300]!r}")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Served]:
    write_models(tmp_path)
    root = tmp_path / "loadable"
    for name in ("first", "second"):
        tiny.write_adapter(root / name)
    with served(
        tmp_path,
        enable_adapter_loading=True,
        adapter_root=root,
        data_dir=tmp_path / "data",
        outcomes_max_rows=20_000,
        num_samples=32,
        log_level="warning",
    ) as server:
        yield server


def _body(number: int) -> dict[str, Any]:
    chooser = random.Random(number)
    texts = [" ".join(chooser.choices(WORDS, k=chooser.choice([4, 8, 16]))) for _ in range(chooser.choice([1, 1, 1, 3]))]
    return {"inputs": texts}


async def _ask(server: Served, soak: Soak, number: int) -> None:
    """Request a prediction, and send a label for one in four."""
    answer = await post(server.port, _body(number))
    soak.count("predict", answer)
    soak.seconds.append(answer.seconds)
    if answer.status == 200 and number % 4 == 0:
        ids = [prediction["id"] for prediction in json.loads(answer.body)["predictions"]]
        labels = [{"id": name, "label": "red"} for name in ids]
        soak.count("feedback", await post(server.port, labels, "/feedback"))


async def _reload(server: Served, soak: Soak, until: float) -> None:
    """Load, replace and unload an adapter again and again, with predictions in between. An unloaded one gives a 404."""
    number = 0
    while time.monotonic() < until:
        name = ("first", "second")[number % 2]
        load = {"lora_name": "guest", "lora_path": name}
        soak.count("load", await post(server.port, load, "/v1/load_lora_adapter"))
        soak.count("guest", await post(server.port, _body(number) | {"adapter": "guest"}))
        soak.count("replace", await post(server.port, load | {"replace": True}, "/v1/load_lora_adapter"))
        soak.count("guest", await post(server.port, _body(number) | {"adapter": "guest"}))
        soak.count("unload", await post(server.port, {"lora_name": "guest"}, "/v1/unload_lora_adapter"))
        soak.count("gone", await post(server.port, _body(number) | {"adapter": "guest"}), expected=(404,))
        number += 1
        await asyncio.sleep(3)


async def _watch(server: Served, soak: Soak, until: float) -> None:
    process = psutil.Process(server.process.pid)
    began = time.monotonic()
    while time.monotonic() < until:
        answered = sum(soak.statuses.values())
        sample = Sample(
            time.monotonic() - began, answered, process.memory_info().rss, process.num_fds(), process.num_threads()
        )
        soak.samples.append(sample)
        if len(soak.samples) % 12 == 1:
            print(
                f"{sample.at:6.0f} s {answered:8} answers {sample.rss / 2**20:8.1f} MiB {sample.files:4} files "
                f"{sample.threads:3} threads {len(soak.unexpected)} unexpected {soak.unexpected[:1]}",
                flush=True,
            )
        await asyncio.sleep(5)


async def _capacity(server: Served, soak: Soak, numbers: Iterator[int], seconds: float) -> float:
    """Predictions per second, with clients that send the next request as soon as they have an answer."""
    before, began = soak.statuses["predict", 200], time.monotonic()
    until = began + seconds

    async def client() -> None:
        while time.monotonic() < until:
            await _ask(server, soak, next(numbers))

    await asyncio.gather(*(client() for _ in range(CLIENTS)))
    return (soak.statuses["predict", 200] - before) / (time.monotonic() - began)


async def _soak(server: Served, seconds: float) -> Soak:
    soak, chooser, numbers = Soak(), random.Random(0), itertools.count()
    until = time.monotonic() + seconds
    beside = [asyncio.create_task(_reload(server, soak, until)), asyncio.create_task(_watch(server, soak, until))]
    running: set[asyncio.Task[None]] = set()
    while (now := time.monotonic()) < until:
        round_end = min(until, now + ROUND)
        soak.capacities.append(await _capacity(server, soak, numbers, PROBE))
        due = time.monotonic()
        while due < round_end and len(running) <= UNANSWERED:  # Poisson arrivals
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            task = asyncio.create_task(_ask(server, soak, next(numbers)))
            running.add(task)
            task.add_done_callback(running.discard)
            due += chooser.expovariate(LOAD * soak.capacities[-1])
    await asyncio.gather(*running, *beside)
    return soak


def _memory(samples: list[Sample]) -> float:
    return statistics.median(sample.rss for sample in samples)


def test_an_hour_at_four_fifths_of_capacity_changes_nothing(server: Served) -> None:
    soak = asyncio.run(_soak(server, SECONDS))
    settled = [sample for sample in soak.samples if sample.answered >= SETTLING]
    start, end = settled[: max(3, len(settled) // 20)], settled[-max(3, len(settled) // 20) :]
    growth = _memory(end) / _memory(start) - 1
    latencies = statistics.quantiles(soak.seconds, n=100)
    low, middle, high = min(soak.capacities), statistics.median(soak.capacities), max(soak.capacities)
    print(
        f"\n{os.cpu_count()} cores; capacity {middle:.1f} predictions/s at the median, {low:.1f} to {high:.1f}; "
        f"{LOAD:.0%} of it offered"
    )
    print(f"{dict(soak.statuses)}")
    print(f"median {latencies[49] * 1e3:.1f} ms, p99 {latencies[98] * 1e3:.1f} ms; memory {growth:+.2%} after the settling")
    least = {what: [min(getattr(s, what) for s in part) for part in (start, end)] for what in ("files", "threads")}
    print(f"at least {least} at the start and at the end; connections that are being answered come on top")
    assert soak.unexpected == []
    assert growth <= 0.02
    for before, after in least.values():
        assert after <= before + 2
    assert server.stop() == 0
