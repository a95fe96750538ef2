"""A connection and a thread for looking only, so that a long look holds up no write."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from sqlalchemy import Connection

from scalabl_server.outcomes.database import Database, UnavailableError

Result = TypeVar("Result")


class Reader:
    """Looks at the database one look after the other; connects when first asked.

    Args:
        database: its own, which no other thread uses.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="outcomes-reader")

    def submit(self, look: Callable[[Connection], Result]) -> Future[Result]:
        """Run `look` in a transaction; the future fails with `UnavailableError` when the database does.

        Raises:
            UnavailableError: it was stopped.
        """
        try:
            return self._thread.submit(self._run, look)
        except RuntimeError:
            raise UnavailableError("the server is shutting down") from None

    def stop(self) -> None:
        """Close the connection once what was submitted is over."""
        self._thread.shutdown()
        self._database.close()

    def _run(self, look: Callable[[Connection], Result]) -> Result:
        with self._database.transaction(write=False) as connection:
            return look(connection)
