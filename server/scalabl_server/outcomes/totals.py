"""The calibration counters of one replica: stored in the database, with a copy in memory for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import Connection, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.sql.dml import Insert

from scalabl_server.outcomes.prepared import PreparedInsert
from scalabl_server.outcomes.scoring import FAMILIES, RETRACTED, UPPER_EDGES, Amounts, Family
from scalabl_server.outcomes.tables import TOTALS

OF_LEVELS = {name for name, family in FAMILIES.items() if family.label == "level"}
Key = tuple[str, str, str]  # (adapter, name in FAMILIES, bin or level)


@dataclass
class Additions:
    """The amounts that one transaction adds to the totals."""

    values: dict[Key, float] = field(default_factory=dict)

    def add(self, adapter: str, amounts: Amounts) -> None:
        for (name, bin_or_level), amount in amounts.items():
            key = (adapter, name, bin_or_level)
            self.values[key] = self.values.get(key, 0.0) + amount


def _upsert(rows: Sequence[Mapping[str, Any]], dialect: str) -> Insert:
    insert = (sqlite.insert if dialect == "sqlite" else postgresql.insert)(TOTALS).values(rows)
    return insert.on_conflict_do_update(
        index_elements=list(TOTALS.primary_key), set_={"value": TOTALS.c.value + insert.excluded.value}
    ).returning(TOTALS.c.adapter, TOTALS.c.name, TOTALS.c.key, TOTALS.c.value)


ADD_TOTALS = PreparedInsert(("replica", "adapter", "name", "key", "value"), _upsert)


def save(connection: Connection, replica: str, additions: Additions) -> dict[Key, float]:
    """Add to the totals of a replica in the database; returns the new values of the changed totals."""
    if not additions.values:
        return {}
    rows = [
        {"replica": replica, "adapter": adapter, "name": name, "key": key, "value": value}
        for (adapter, name, key), value in sorted(additions.values.items())
    ]
    new_values = ADD_TOTALS.run(connection, rows)
    return {(adapter, name, key): value for adapter, name, key, value in new_values}


def load(connection: Connection, replica: str) -> dict[Key, float]:
    """All totals of a replica."""
    rows = connection.execute(select(TOTALS).where(TOTALS.c.replica == replica))
    return {(row.adapter, row.name, row.key): row.value for row in rows}


class TotalsCollector(Collector):
    """Exports the committed totals to Prometheus from memory, without access to the database.

    Before the stored totals have been loaded it exports nothing: a counter that starts at 0 and then jumps to its stored
    value would look like an increase.
    """

    def __init__(self) -> None:
        self._values: dict[Key, float] | None = None
        self._adapters: frozenset[str] = frozenset()

    def replace(self, values: dict[Key, float]) -> None:
        self._values = values

    def update(self, values: dict[Key, float]) -> None:
        """Overwrite some totals. Makes a new dict, so that a scrape on another thread sees a consistent state."""
        self._values = (self._values or {}) | values

    def show(self, adapter: str) -> None:
        """Export an adapter's counters from 0 on, so that PromQL sees its first prediction as an increase."""
        self._adapters |= {adapter}

    def collect(self) -> Iterator[Metric]:
        values = self._values
        if values is None:
            return
        adapters = sorted(self._adapters | {adapter for adapter, _, _ in values})
        levels = {(adapter, key) for adapter, name, key in values if name in OF_LEVELS}
        for name, family in FAMILIES.items():
            yield _samples(family.metric, family.text, name, family, values, adapters, levels)
            if family.of_labels:
                text = f"Retracted because a label was corrected, from: {family.text}"
                yield _samples(family.metric + RETRACTED, text, name + RETRACTED, family, values, adapters, levels)


def _samples(
    metric: str,
    text: str,
    name: str,
    family: Family,
    values: dict[Key, float],
    adapters: list[str],
    levels: set[tuple[str, str]],
) -> Metric:
    metric_family = CounterMetricFamily(metric, text, labels=["adapter", family.label])
    for adapter in adapters:
        keys = UPPER_EDGES if family.label == "bin" else sorted(key for owner, key in levels if owner == adapter)
        for key in keys:
            metric_family.add_metric([adapter, key], values.get((adapter, name, key), 0.0))
    return metric_family
