"""INSERT statements that are compiled once and passed to the driver directly, for the inserts that every answer waits for.

SQLAlchemy would take longer to prepare such a statement than SQLite takes to execute and sync it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from sqlalchemy import Connection, Dialect
from sqlalchemy.sql.dml import Insert

ROWS = 64  # per statement; SQLite and PostgreSQL both limit the number of parameters


class PreparedInsert:
    """An INSERT statement for any number of rows.

    Args:
        columns: names of the columns; every row has a value for each.
        make: returns the statement for some rows in a dialect.
    """

    def __init__(self, columns: Sequence[str], make: Callable[[Sequence[Mapping[str, Any]], str], Insert]) -> None:
        self._columns, self._make = tuple(columns), make
        self._compiled = lru_cache(maxsize=4 * ROWS)(self._compile)

    def run(self, connection: Connection, rows: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
        """Insert the rows; returns the rows of the statement's RETURNING clause, if it has one.

        Raises:
            Exception: the driver's own error.
        """
        returned: list[tuple[Any, ...]] = []
        cursor = connection.connection.cursor()
        for start in range(0, len(rows), ROWS):
            part = rows[start : start + ROWS]
            text, order = self._compiled(connection.dialect, len(part))
            values = {f"{name}_m{number}": row[name] for number, row in enumerate(part) for name in self._columns}
            # The driver takes parameters either by name or by position.
            cursor.execute(text, values if order is None else tuple(map(values.__getitem__, order)))
            returned += cursor.fetchall() if cursor.description is not None else ()
        cursor.close()
        return returned

    def _compile(self, dialect: Dialect, count: int) -> tuple[str, tuple[str, ...] | None]:
        """The SQL text for the driver, and the order of its parameters if the driver takes them by position."""
        statement = self._make([dict.fromkeys(self._columns)] * count, dialect.name)
        compiled = statement.inline().compile(dialect=dialect)
        order = compiled.positiontup if compiled.positional else None
        return str(compiled), None if order is None else tuple(order)
