"""INSERTs that every answer waits for, compiled once and given to the driver: SQLAlchemy takes longer over one than SQLite
does, sync included."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from sqlalchemy import Connection, Dialect
from sqlalchemy.sql.dml import Insert

ROWS = 64  # of one statement; SQLite and PostgreSQL both bound its parameters


class PreparedInsert:
    """An INSERT of any number of rows.

    Args:
        columns: of which every row has a value.
        make: the statement for these rows, in this dialect.
    """

    def __init__(self, columns: Sequence[str], make: Callable[[Sequence[Mapping[str, Any]], str], Insert]) -> None:
        self._columns, self._make = tuple(columns), make
        self._compiled = lru_cache(maxsize=4 * ROWS)(self._compile)

    def run(self, connection: Connection, rows: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
        """Insert; what the statement returns of each row, if it does.

        Raises:
            Exception: the driver's own error.
        """
        returned: list[tuple[Any, ...]] = []
        cursor = connection.connection.cursor()
        for start in range(0, len(rows), ROWS):
            part = rows[start : start + ROWS]
            text, order = self._compiled(connection.dialect, len(part))
            values = {f"{name}_m{number}": row[name] for number, row in enumerate(part) for name in self._columns}
            # By position or by name, as the driver wants them.
            cursor.execute(text, values if order is None else tuple(map(values.__getitem__, order)))
            returned += cursor.fetchall() if cursor.description is not None else ()
        cursor.close()
        return returned

    def _compile(self, dialect: Dialect, count: int) -> tuple[str, tuple[str, ...] | None]:
        """The driver's text, and the order of its parameters where they have no names."""
        statement = self._make([dict.fromkeys(self._columns)] * count, dialect.name)
        compiled = statement.inline().compile(dialect=dialect)
        order = compiled.positiontup if compiled.positional else None
        return str(compiled), None if order is None else tuple(order)
