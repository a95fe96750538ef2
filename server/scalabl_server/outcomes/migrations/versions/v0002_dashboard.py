"""Version 2: indexes for the dashboard's queries (an adapter's newest predictions, newest labels and totals)."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Create the indexes."""
    labelled = sa.text("label IS NOT NULL")
    op.create_index("scalabl_predictions_adapter", "scalabl_predictions", ["adapter", "seq"])
    op.create_index(
        "scalabl_predictions_labelled",
        "scalabl_predictions",
        ["adapter", "seq"],
        sqlite_where=labelled,
        postgresql_where=labelled,
    )
    op.create_index("scalabl_totals_adapter", "scalabl_totals", ["adapter"])


def downgrade() -> None:
    """Drop the indexes."""
    op.drop_index("scalabl_totals_adapter", "scalabl_totals")
    for name in ("labelled", "adapter"):
        op.drop_index(f"scalabl_predictions_{name}", "scalabl_predictions")
