"""Reads the dashboard's data: one adapter's totals over all replicas, its newest predictions and its newest labels.

The work is bounded: each list ends after `MOST_ROWS` predictions or `MOST_CHARACTERS` characters of JSON. What the page
shows is computed from it in `dashboard`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from sqlalchemy import ColumnElement, Connection, func, select

from scalabl_server.outcomes.scoring import FAMILIES, RETRACTED, Amounts
from scalabl_server.outcomes.stored_answers import from_text
from scalabl_server.outcomes.tables import PREDICTIONS, TOTALS

MOST_ROWS = 1000
MOST_CHARACTERS = 4_000_000  # an answer has about 1,000 characters for ten choices and 20,000 for 256, 12,000 for 1,000
MOST_DOUBTFUL = 10


@dataclass(frozen=True)
class Seen:
    """A stored prediction; `label` is the index of its latest label, as in `scoring.of_label`, None if it has no label."""

    id: str
    created_at: float
    answer: dict[str, Any]
    label: int | None
    input: str | None = None


@dataclass(frozen=True)
class Survey:
    """What is stored about an adapter. All lists are sorted from new to old, except `doubtful` when it is by entropy.

    Attributes:
        amounts: sums over all replicas and all time, without labels that were corrected later.
        recent: the newest predictions.
        labelled: the newest predictions that have a label.
        doubtful: the newest abstentions in `recent`, or, if none of `recent` could abstain, those with the largest entropy.
        abstains: whether any of `recent` could abstain.
    """

    amounts: Amounts
    recent: list[Seen]
    labelled: list[Seen]
    doubtful: list[Seen]
    abstains: bool


def read(connection: Connection, adapter: str) -> Survey:
    """Read everything in one transaction."""
    recent = _newest(connection, PREDICTIONS.c.adapter == adapter)
    labelled = _newest(connection, PREDICTIONS.c.adapter == adapter, PREDICTIONS.c.label.is_not(None))
    abstains = any(prediction.answer.get("abstain") is not None for prediction in recent)
    if abstains:
        candidates: Iterator[Seen] = (prediction for prediction in recent if prediction.answer.get("abstain"))
    else:
        candidates = iter(sorted(recent, key=lambda prediction: prediction.answer["entropy"], reverse=True))
    doubtful = _with_inputs(connection, list(islice(candidates, MOST_DOUBTFUL)))
    return Survey(_amounts(connection, adapter), recent, labelled, doubtful, abstains)


def _newest(connection: Connection, *conditions: ColumnElement[bool]) -> list[Seen]:
    columns = (PREDICTIONS.c[name] for name in ("id", "created_at", "answer", "label"))
    query = select(*columns).where(*conditions).order_by(PREDICTIONS.c.seq.desc()).limit(MOST_ROWS)
    newest: list[Seen] = []
    characters = 0
    with connection.execute(query.execution_options(stream_results=True, max_row_buffer=50)) as rows:
        for row in rows:
            characters += len(row.answer)
            if newest and characters > MOST_CHARACTERS:
                break
            newest.append(Seen(row.id, row.created_at, from_text(row.answer), row.label))
    return newest


def _with_inputs(connection: Connection, seen: list[Seen]) -> list[Seen]:
    query = select(PREDICTIONS.c.id, PREDICTIONS.c.input).where(PREDICTIONS.c.id.in_([prediction.id for prediction in seen]))
    inputs = {row.id: row.input for row in connection.execute(query) if row.input is not None}
    return [
        replace(prediction, input=json.loads(inputs[prediction.id])) if prediction.id in inputs else prediction
        for prediction in seen
    ]


def _amounts(connection: Connection, adapter: str) -> Amounts:
    query = (
        select(TOTALS.c.name, TOTALS.c.key, func.sum(TOTALS.c.value).label("value"))
        .where(TOTALS.c.adapter == adapter)
        .group_by(TOTALS.c.name, TOTALS.c.key)
    )
    sums = {(row.name, row.key): float(row.value) for row in connection.execute(query)}
    return {
        (name, key): value - sums.get((name + RETRACTED, key), 0.0)
        for (name, key), value in sums.items()
        if name in FAMILIES
    }
