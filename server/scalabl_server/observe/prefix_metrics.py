"""What Prometheus sees of the kept beginnings of prompts: the store's own counts, read at the scrape."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from scalabl.passes.prefix_cache import PrefixStore


class PrefixCollector(Collector):
    """`store` is the engine's, once it is loaded."""

    def __init__(self) -> None:
        self.store = PrefixStore(0)

    def collect(self) -> Iterator[Metric]:
        store, prefix = self.store, "scalabl_prefix_cache"
        text = "Tokens of prompts that were looked up among kept beginnings."
        yield CounterMetricFamily(f"{prefix}_queried_tokens", text, store.queried_tokens)
        yield CounterMetricFamily(f"{prefix}_hit_tokens", "Those of them that no pass computed.", store.hit_tokens)
        yield CounterMetricFamily(f"{prefix}_evictions", "Kept beginnings that made room for others.", store.evictions)
        yield GaugeMetricFamily(f"{prefix}_bytes", "Keys and values that are kept.", store.bytes)
        yield GaugeMetricFamily(f"{prefix}_limit_bytes", "The most that is kept.", store.limit)
