"""Version 3: a label may be -1, which means that none of the choices is the true answer.

The tables are the same. The version keeps out earlier releases, which would read -1 as the last choice.
"""

from __future__ import annotations

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    """Change nothing."""


def downgrade() -> None:
    """Change nothing."""
