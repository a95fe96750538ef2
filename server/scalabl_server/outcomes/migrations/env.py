"""What alembic runs: the migrations on the connection that `Database` hands over, in its transaction."""

from __future__ import annotations

from alembic import context

from scalabl_server.outcomes.tables import METADATA, VERSION_TABLE

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA, version_table=VERSION_TABLE)
with context.begin_transaction():
    context.run_migrations()
