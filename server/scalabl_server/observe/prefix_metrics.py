"""Prometheus metrics of the prefix cache, read from the cache at each scrape. The cache itself is in `scalabl.passes`."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from scalabl.passes.prefix_cache import PrefixStore


class PrefixCollector(Collector):
    """Reports the counts of `store`: an empty cache at first, the engine's cache once the engine is loaded."""

    def __init__(self) -> None:
        self.store = PrefixStore(0)

    def collect(self) -> Iterator[Metric]:
        store, prefix = self.store, "scalabl_prefix_cache"
        text = "Prompt tokens that were looked up in the prefix cache."
        yield CounterMetricFamily(f"{prefix}_queried_tokens", text, store.queried_tokens)
        yield CounterMetricFamily(
            f"{prefix}_hit_tokens",
            "Prompt tokens that were found in the prefix cache and not computed again.",
            store.hit_tokens,
        )
        yield CounterMetricFamily(
            f"{prefix}_evictions", "Prefixes dropped from the prefix cache to make room for others.", store.evictions
        )
        yield GaugeMetricFamily(f"{prefix}_bytes", "Size of the keys and values in the prefix cache.", store.bytes)
        yield GaugeMetricFamily(f"{prefix}_limit_bytes", "Largest size of the prefix cache.", store.limit)
