"""Prometheus metrics of novelty: p-values of the inputs, how many are novel, and the martingale that tells a drift."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

P_VALUES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)


class NoveltyMetrics:
    """The metrics of all adapters that have novelty p-values; others have none of them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._p_value = Histogram(
            "scalabl_novelty_p_value",
            "Novelty p-values of inputs. They are uniform if the inputs are like the calibration data.",
            ["adapter"],
            buckets=P_VALUES,
            registry=registry,
        )
        self._novel = Counter(
            "scalabl_novel_inputs",
            "Inputs whose novelty p-value is at most the adapter's level.",
            ["adapter"],
            registry=registry,
        )
        self._level = Gauge(
            "scalabl_novelty_level",
            "The level at which inputs are called novel: the largest share of inputs like the calibration data.",
            ["adapter"],
            registry=registry,
        )
        self._martingale = Gauge(
            "scalabl_novelty_martingale_log10",
            "Decimal logarithm of the test martingale against a drift: 2 means 100. Without a drift it exceeds 2 with a "
            "probability of at most 1% in the life of the process.",
            ["adapter"],
            registry=registry,
        )

    def show(self, adapter: str, level: float) -> None:
        """Create an adapter's metrics before its first input, so that PromQL sees that as an increase."""
        self._level.labels(adapter).set(level)
        self._martingale.labels(adapter).set(0)
        self._novel.labels(adapter)
        self._p_value.labels(adapter)

    def forget(self, adapter: str) -> None:
        """Remove the gauges of an adapter that was unloaded or replaced. Counters stay, since they only grow."""
        for gauge in (self._level, self._martingale):
            gauge.remove(adapter)

    def observe(self, adapter: str, p_value: float, martingale_log10: float, *, novel: bool) -> None:
        """Record one input, and the martingale after it."""
        self._p_value.labels(adapter).observe(p_value)
        self._novel.labels(adapter).inc(novel)
        self._martingale.labels(adapter).set(martingale_log10)
