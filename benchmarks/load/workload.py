"""What the server under load serves and is asked: its settings, and requests made of the example's queries."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from benchmarks import example


@dataclass(frozen=True)
class Workload:
    """A base model's folder, an adapter's (None: the example's) and the posterior samples of a request."""

    model: str
    adapter: Path | None
    num_samples: int

    @property
    def settings(self) -> dict[str, object]:
        """Of the server, by the names of its flags."""
        return {
            "model": self.model,
            "adapter": self.adapter or example.ADAPTER,
            "num_samples": self.num_samples,
            "max_queue": 100_000,
            "request_timeout": 600,
            "prefix_cache_bytes": 0,  # the prompts come again, those of real traffic do not
        }


def request_bodies(count: int) -> list[dict[str, object]]:
    """Requests of one or two of the example's queries each, the same every time."""
    queries = example.queries()
    chance = random.Random(0)
    return [{"inputs": " and ".join(chance.sample(queries, chance.choice((1, 1, 2))))} for _ in range(count)]
