"""Version 1: tables for predictions, their labels, the totals of each replica, and the replicas."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

ROW = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    """Create the tables."""
    op.create_table(
        "scalabl_predictions",
        sa.Column("seq", ROW, sa.Identity(), primary_key=True),
        sa.Column("id", sa.String(64), nullable=False, unique=True),
        sa.Column("created_at", sa.Double, nullable=False, index=True),
        sa.Column("adapter", sa.Text, nullable=False),
        sa.Column("model", sa.Text, nullable=False),
        sa.Column("answer", sa.Text, nullable=False),
        sa.Column("input_hash", sa.String(64), nullable=False),
        sa.Column("input", sa.Text),
        sa.Column("label", sa.Integer),
    )
    op.create_table(
        "scalabl_labels",
        sa.Column("seq", ROW, sa.Identity(), primary_key=True),
        sa.Column(
            "prediction", ROW, sa.ForeignKey("scalabl_predictions.seq", ondelete="CASCADE"), nullable=False, index=True
        ),
        sa.Column("label", sa.Integer, nullable=False),
        sa.Column("labelled_at", sa.Double, nullable=False),
        sa.Column("replica", sa.Text, nullable=False),
    )
    op.create_table(
        "scalabl_totals",
        sa.Column("replica", sa.Text, primary_key=True),
        sa.Column("adapter", sa.Text, primary_key=True),
        sa.Column("name", sa.String(64), primary_key=True),
        sa.Column("key", sa.String(32), primary_key=True),
        sa.Column("value", sa.Double, nullable=False),
    )
    op.create_table(
        "scalabl_replicas",
        sa.Column("replica", sa.Text, primary_key=True),
        sa.Column("incarnation", sa.String(32), nullable=False),
        sa.Column("seen_at", sa.Double, nullable=False),
    )


def downgrade() -> None:
    """Drop the tables."""
    for table in ("replicas", "totals", "labels", "predictions"):
        op.drop_table(f"scalabl_{table}")
