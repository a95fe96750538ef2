"""What storing a prediction before it is answered costs: its latency beside that of the disk's own sync.

python -m benchmarks.outcomes [--url postgresql://user@host/database]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import tempfile
import time
import uuid
from pathlib import Path

from scalabl_server.observe.metrics import Metrics
from scalabl_server.outcomes.store import OutcomeStore
from scalabl_server.schemas.prediction import Prediction
from scalabl_server.settings import ServeSettings

from benchmarks.machine import describe
from benchmarks.timing import spread

PROBABILITIES = {f"choice number {n}": p for n, p in enumerate((0.5, 0.2, 0.1, 0.1, 0.1))}
DEADLINE = 60.0  # seconds that a request has left, more than storing it ever takes


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", help="database (default: a new SQLite file in the folder for temporary files)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--predictions", type=int, default=1000, help="of all clients together")
    options = parser.parse_args()
    print(describe())
    with tempfile.TemporaryDirectory() as folder:
        sync = _median_sync(Path(folder) / "page")
        print(f"fsync of a page: {1e3 * sync:.2f} ms")
        asyncio.run(_measure(options.url or f"sqlite:///{folder}/outcomes.db", options.clients, options.predictions, sync))


def _median_sync(file: Path) -> float:
    """The physical limit: seconds until one page is on disk."""
    times = []
    with file.open("wb", buffering=0) as opened:
        for _ in range(200):
            opened.write(bytes(4096))
            started = time.perf_counter()
            os.fsync(opened.fileno())
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def _prediction() -> Prediction:
    return Prediction.model_construct(
        id=f"pred-{uuid.uuid4().hex}",
        recorded=True,
        prediction="choice number 0",
        index=0,
        confidence=0.5,
        probabilities=PROBABILITIES,
    )


async def _measure(url: str, clients: list[int], predictions: int, sync: float) -> None:
    store = OutcomeStore(ServeSettings(adapter=Path(), outcomes_url=url, replica_id="benchmark"), Metrics())
    await store.start()

    async def ask(times: list[float], count: int) -> None:
        for _ in range(count):
            prediction = _prediction()
            started = time.perf_counter()
            (answered,) = await store.record("benchmark", "none", ["text"], [prediction], DEADLINE)
            times.append(time.perf_counter() - started)
            assert answered.recorded

    await ask([], 20)
    for number in clients:
        times: list[float] = []
        started = time.perf_counter()
        await asyncio.gather(*(ask(times, predictions // number) for _ in range(number)))
        rate = len(times) / (time.perf_counter() - started)
        latency = spread(times)
        print(
            f"{number:3d} clients: median {1e3 * latency['median']:.2f} ms ({latency['median'] / sync:.1f} syncs), "
            f"95% {1e3 * latency['p95']:.2f} ms, "
            f"{rate:.0f} predictions/s ({rate * sync:.1f} per sync)"
        )
    await store.stop()


if __name__ == "__main__":
    main()
