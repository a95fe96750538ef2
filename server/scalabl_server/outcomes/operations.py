"""The SQL inside a transaction: insert predictions, store labels, look up a prediction, delete the oldest. Transactions
themselves are begun by `writer`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from sqlalchemy import Connection, Row, bindparam, delete, func, insert, or_, select, update

from scalabl_server.outcomes import scoring
from scalabl_server.outcomes.prepared import PreparedInsert
from scalabl_server.outcomes.stored_answers import from_text, to_text
from scalabl_server.outcomes.tables import LABELS, PREDICTIONS
from scalabl_server.outcomes.totals import Additions
from scalabl_server.text import quoted

Status = Literal["recorded", "unchanged", "corrected"]

INSERT_PREDICTIONS = PreparedInsert(
    ("id", "created_at", "adapter", "model", "answer", "input_hash", "input"),
    lambda rows, _: insert(PREDICTIONS).values(rows),
)
SHOWN_CHOICES = 20
SHOWN_CHARACTERS = 80


@dataclass(frozen=True)
class NewPrediction:
    """A prediction to store: the input and the answer."""

    id: str
    adapter: str
    model: str
    answer: dict[str, Any]
    input_hash: str
    input: str | None


@dataclass(eq=False)
class Refusal(Exception):
    """A label that cannot be stored. `position` is its index in the request."""

    kind: Literal["unknown", "label"]
    position: int
    detail: str


@dataclass(frozen=True)
class Stored:
    """A stored prediction with its labels, the oldest first."""

    id: str
    adapter: str
    model: str
    created_at: float
    answer: dict[str, Any]
    input_hash: str
    input: str | None
    labels: list[tuple[str | None, float]]


def insert_predictions(connection: Connection, rows: Sequence[NewPrediction], now: float, additions: Additions) -> None:
    """Insert new predictions and add them to the counts in `additions`."""
    if not rows:
        return
    INSERT_PREDICTIONS.run(
        connection,
        [
            {
                "id": row.id,
                "created_at": now,
                "adapter": row.adapter,
                "model": row.model,
                "answer": to_text(row.answer),
                "input_hash": row.input_hash,
                "input": None if row.input is None else json.dumps(row.input),
            }
            for row in rows
        ],
    )
    for row in rows:
        additions.add(row.adapter, scoring.of_prediction(row.answer))


@dataclass
class LabelRound:
    """The labels of one transaction, from several requests. All labels of a request are stored, or none."""

    rows: dict[str, Row[Any]]
    now: float
    labels: dict[str, int | None] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    delays: list[tuple[str, float]] = field(default_factory=list)  # (adapter, seconds) of first labels

    @classmethod
    def read(cls, connection: Connection, ids: Iterable[str], now: float) -> LabelRound:
        """Read and lock the predictions. All replicas lock in the same order, so that there is no deadlock."""
        predictions = connection.execute(
            select(PREDICTIONS).where(PREDICTIONS.c.id.in_(sorted(set(ids)))).order_by(PREDICTIONS.c.id).with_for_update()
        )
        rows = {row.id: row for row in predictions}
        return cls(rows, now, {name: row.label for name, row in rows.items()})

    def take(self, labels: Sequence[tuple[str, str | None]], replica: str, additions: Additions) -> list[Status]:
        """Accept the (prediction id, label) pairs of one request, to be stored by `write`. None: none of the choices.

        Raises:
            Refusal: the first label that cannot be stored. No label of the request is stored then.
        """
        indices = []
        for position, (name, label) in enumerate(labels):
            row = self.rows.get(name)
            if row is None:
                raise Refusal("unknown", position, absent(name))
            choices = scoring.choices_of(from_text(row.answer))
            if label is not None and label not in choices:
                raise Refusal(
                    "label",
                    position,
                    f"{quoted(label, SHOWN_CHARACTERS)} is not among the choices of this prediction: {_list(choices)}; "
                    "if none of them is the true answer, send null",
                )
            indices.append(scoring.NONE if label is None else choices.index(label))
        return [
            self._set(self.rows[name], index, replica, additions) for (name, _), index in zip(labels, indices, strict=True)
        ]

    def _set(self, row: Row[Any], label: int, replica: str, additions: Additions) -> Status:
        before = self.labels[row.id]
        if before == label:
            return "unchanged"
        answer = from_text(row.answer)
        additions.add(row.adapter, scoring.of_label(answer, label))
        self.labels[row.id] = label
        self.history.append({"prediction": row.seq, "label": label, "labelled_at": self.now, "replica": replica})
        if before is None:
            self.delays.append((row.adapter, max(0.0, self.now - row.created_at)))
            return "recorded"
        additions.add(row.adapter, scoring.retraction(scoring.of_label(answer, before)))
        return "corrected"

    def write(self, connection: Connection) -> None:
        """Store the accepted labels."""
        changed = [
            {"at": row.seq, "value": self.labels[name]} for name, row in self.rows.items() if self.labels[name] != row.label
        ]
        # A label that was changed and changed back in this transaction is unchanged, but has a history.
        if self.history:
            connection.execute(insert(LABELS), self.history)
        if changed:
            connection.execute(
                update(PREDICTIONS).where(PREDICTIONS.c.seq == bindparam("at")).values(label=bindparam("value")), changed
            )


def look_up(connection: Connection, name: str) -> Stored | None:
    """A stored prediction by its id, None if there is none."""
    row = connection.execute(select(PREDICTIONS).where(PREDICTIONS.c.id == name)).one_or_none()
    if row is None:
        return None
    answer = from_text(row.answer)
    labels = connection.execute(select(LABELS).where(LABELS.c.prediction == row.seq).order_by(LABELS.c.seq))
    return Stored(
        id=row.id,
        adapter=row.adapter,
        model=row.model,
        created_at=row.created_at,
        answer=answer,
        input_hash=row.input_hash,
        input=None if row.input is None else json.loads(row.input),
        labels=[(scoring.label_of(answer, label.label), label.labelled_at) for label in labels],
    )


def delete_oldest(connection: Connection, *, older_than: float | None, max_rows: int, limit: int) -> int:
    """Delete at most `limit` predictions: those older than a time, and the oldest above a number.

    Args:
        older_than: seconds since 1970; None deletes none because of its age.
        max_rows: how many of the newest predictions stay.

    Returns:
        The number of deleted predictions.
    """
    seq = PREDICTIONS.c.seq
    newest = select(func.max(seq)).scalar_subquery()
    surplus = seq <= newest - max_rows
    expired = surplus if older_than is None else or_(surplus, PREDICTIONS.c.created_at < older_than)
    query = select(seq).where(expired).order_by(seq).limit(limit).with_for_update(skip_locked=True)
    oldest = connection.execute(query).scalars().all()
    if oldest:
        connection.execute(delete(PREDICTIONS).where(seq.in_(oldest)))  # the foreign key deletes their labels too
    return len(oldest)


def absent(name: str) -> str:
    """The message for an id that is not, or no longer, stored."""
    return f"there is no prediction {quoted(name, SHOWN_CHARACTERS)}; the id is wrong, or the prediction has expired"


def _list(choices: Sequence[str]) -> str:
    shown = ", ".join(quoted(choice, SHOWN_CHARACTERS) for choice in choices[:SHOWN_CHOICES])
    return shown if len(choices) <= SHOWN_CHOICES else f"{shown}, … ({len(choices)} in all)"
