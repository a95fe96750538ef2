"""The script that alembic runs. It applies the migrations on the connection and in the transaction of `Database`."""

from __future__ import annotations

from alembic import context

from scalabl_server.outcomes.tables import METADATA, VERSION_TABLE

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA, version_table=VERSION_TABLE)
with context.begin_transaction():
    context.run_migrations()
