"""The current tables of the outcomes database. `migrations` creates them.

Times are seconds since 1970 (UTC). A request's text is stored as ASCII JSON, since PostgreSQL's text cannot hold NUL.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, Column, Double, ForeignKey, Identity, Index, Integer, MetaData, String, Table, Text

METADATA = MetaData()
VERSION_TABLE = "scalabl_version"

ROW = BigInteger().with_variant(Integer, "sqlite")

PREDICTIONS = Table(
    "scalabl_predictions",
    METADATA,
    Column("seq", ROW, Identity(), primary_key=True),  # in order of insertion; the oldest are deleted by it
    Column("id", String(64), nullable=False, unique=True),
    Column("created_at", Double, nullable=False, index=True),
    Column("adapter", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("answer", Text, nullable=False),  # the answer without samples, as `stored_answers` writes it
    Column("input_hash", String(64), nullable=False),
    Column("input", Text),  # only with --store-inputs
    Column("label", Integer),  # index of the latest label in the answer's choices; -1: none of them; NULL: no label yet
)

LABELS = Table(
    "scalabl_labels",
    METADATA,
    Column("seq", ROW, Identity(), primary_key=True),
    Column("prediction", ROW, ForeignKey(PREDICTIONS.c.seq, ondelete="CASCADE"), nullable=False, index=True),
    Column("label", Integer, nullable=False),  # as above
    Column("labelled_at", Double, nullable=False),
    Column("replica", Text, nullable=False),
)

Index("scalabl_predictions_adapter", PREDICTIONS.c.adapter, PREDICTIONS.c.seq)
Index(
    "scalabl_predictions_labelled",
    PREDICTIONS.c.adapter,
    PREDICTIONS.c.seq,
    sqlite_where=PREDICTIONS.c.label.is_not(None),
    postgresql_where=PREDICTIONS.c.label.is_not(None),
)

# The counters of each replica, one number per row, so that a new counter needs no migration.
TOTALS = Table(
    "scalabl_totals",
    METADATA,
    Column("replica", Text, primary_key=True),
    Column("adapter", Text, primary_key=True),
    Column("name", String(64), primary_key=True),
    Column("key", String(32), primary_key=True),
    Column("value", Double, nullable=False),
)

Index("scalabl_totals_adapter", TOTALS.c.adapter)

# Which process writes the totals of a replica. With it, two processes with the same replica id are detected.
REPLICAS = Table(
    "scalabl_replicas",
    METADATA,
    Column("replica", Text, primary_key=True),
    Column("incarnation", String(32), nullable=False),
    Column("seen_at", Double, nullable=False),
)
