"""The running totals of one replica: kept in the database, read by Prometheus from memory."""

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
Key = tuple[str, str, str]  # adapter, name of a family, bin or level


@dataclass
class Additions:
    """What one transaction adds."""

    values: dict[Key, float] = field(default_factory=dict)

    def add(self, adapter: str, amounts: Amounts) -> None:
        for (name, key), amount in amounts.items():
            at = (adapter, name, key)
            self.values[at] = self.values.get(at, 0.0) + amount


def _upsert(rows: Sequence[Mapping[str, Any]], dialect: str) -> Insert:
    insert = (sqlite.insert if dialect == "sqlite" else postgresql.insert)(TOTALS).values(rows)
    return insert.on_conflict_do_update(
        index_elements=list(TOTALS.primary_key), set_={"value": TOTALS.c.value + insert.excluded.value}
    ).returning(TOTALS.c.adapter, TOTALS.c.name, TOTALS.c.key, TOTALS.c.value)


ADD_TOTALS = PreparedInsert(("replica", "adapter", "name", "key", "value"), _upsert)


def save(connection: Connection, replica: str, additions: Additions) -> dict[Key, float]:
    """Add to the replica's rows; returns what those hold now."""
    if not additions.values:
        return {}
    rows = [
        {"replica": replica, "adapter": adapter, "name": name, "key": key, "value": value}
        for (adapter, name, key), value in sorted(additions.values.items())
    ]
    saved = ADD_TOTALS.run(connection, rows)
    return {(adapter, name, key): value for adapter, name, key, value in saved}


def load(connection: Connection, replica: str) -> dict[Key, float]:
    """All totals of a replica."""
    rows = connection.execute(select(TOTALS).where(TOTALS.c.replica == replica))
    return {(row.adapter, row.name, row.key): row.value for row in rows}


class TotalsCollector(Collector):
    """What a scrape sees: committed totals only, without a look at the database.

    Until the totals have been read there are none: a counter that starts at 0 and then leaps to its old value would look
    like an increase.
    """

    def __init__(self) -> None:
        self._values: dict[Key, float] | None = None
        self._adapters: frozenset[str] = frozenset()

    def replace(self, values: dict[Key, float]) -> None:
        self._values = values

    def update(self, values: dict[Key, float]) -> None:
        """A new dict each time, so that a scrape on another thread sees one state."""
        self._values = (self._values or {}) | values

    def show(self, adapter: str) -> None:
        """Give an adapter its zeros, so that its first prediction is seen as an increase."""
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
                text = f"Taken back by corrections of: {family.text}"
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
