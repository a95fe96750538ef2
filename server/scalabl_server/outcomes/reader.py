"""A connection and a thread for long read-only queries, so that they do not delay writes. Writes are in `writer`."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from sqlalchemy import Connection

from scalabl_server.outcomes.database import Database, UnavailableError

Result = TypeVar("Result")


class Reader:
    """Runs read-only queries one after the other, on one thread. Connects at the first query.

    Args:
        database: a `Database` that no other thread uses.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="outcomes-reader")

    def submit(self, query: Callable[[Connection], Result]) -> Future[Result]:
        """Run `query` in a transaction. If the database fails, the future fails with `UnavailableError`.

        Raises:
            UnavailableError: the reader was stopped.
        """
        try:
            return self._thread.submit(self._run, query)
        except RuntimeError:
            raise UnavailableError("the server is shutting down") from None

    def stop(self) -> None:
        """Finish the submitted queries and close the connection."""
        self._thread.shutdown()
        self._database.close()

    def _run(self, query: Callable[[Connection], Result]) -> Result:
        with self._database.transaction(write=False) as connection:
            return query(connection)
