"""The connection to the outcomes database: opened and migrated when first needed, and again after it was lost."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import URL, Connection, Engine, create_engine, event, func, make_url, select
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.pool import QueuePool

from scalabl.errors import ScalaBLError
from scalabl_server.outcomes.tables import VERSION_TABLE

MIGRATIONS = Path(__file__).with_name("migrations")
MIGRATION_LOCK = 0x5CA1AB1
PASSING = ("locked", "busy", "full")  # SQLite's words for what ends by itself


class OutcomesError(ScalaBLError):
    """An outcomes database that cannot be used as it is configured; the message says what to change."""


class UnavailableError(Exception):
    """The database cannot be reached or written just now."""


def parse_url(text: str) -> URL:
    """A URL of SQLAlchemy, with the driver that this package uses.

    Raises:
        OutcomesError: neither a SQLite file nor PostgreSQL, or its driver is not installed.
    """
    wanted = "use sqlite:////path/to/file, postgresql://user@host/database or none"
    try:
        url = make_url(text)
    except ArgumentError:
        raise OutcomesError(f"--outcomes-url is not a database URL; {wanted}") from None
    backend = url.get_backend_name()
    if backend == "sqlite":
        if not url.database or ":memory:" in url.database or url.query:
            raise OutcomesError(f"--outcomes-url: SQLite needs a plain file, which outlives the process; {wanted}")
        return url.set(drivername="sqlite", database=os.path.abspath(url.database))
    if backend not in ("postgresql", "postgres"):
        raise OutcomesError(f"--outcomes-url: {backend} is not supported; {wanted}")
    try:
        import psycopg  # noqa: F401  (only whether it is there; SQLAlchemy imports it by its URL)
    except ImportError:
        raise OutcomesError("--outcomes-url: PostgreSQL needs a driver; pip install 'scalabl[postgres]'") from None
    return url.set(drivername="postgresql+psycopg")


class Database:
    """One connection, used by one thread at a time.

    A SQLite file that was moved or replaced under the open connection would go on taking writes that nobody can find again:
    its identity is compared before each transaction and after each commit. A lost file is not made anew while the process
    runs, since that would forget every prediction; it is waited for.

    Args:
        url: see `parse_url`; looked at when the database is opened.
        timeout: seconds to wait for a lock, a connection or a statement.
        may_create: whether a SQLite file that is not there may be made.
    """

    def __init__(self, url: str, timeout: float, *, may_create: bool = True) -> None:
        self._url, self._timeout = url, timeout
        self._engine: Engine | None = None
        self._file: str | None = None
        self._identity: tuple[int, int] | None = None
        self._may_create = may_create
        self._ready = False
        self._kept: Connection | None = None
        self._writes = True  # what the next transaction is for
        # Of the driver's own: hooks and `PreparedInsert` go to it directly.
        self._errors: tuple[type[Exception], ...] = (DBAPIError,)
        self.openings = 0  # rises each time that the contents may be others than before

    def open(self) -> Engine:
        """Connect and migrate; does nothing when that is done.

        Raises:
            UnavailableError: not just now.
            OutcomesError: not with this configuration.
        """
        if self._ready and self._engine is not None:
            return self._engine
        if self._engine is None:
            url = parse_url(self._url)
            self._engine = self._sqlite(str(url.database)) if url.get_backend_name() == "sqlite" else self._postgresql(url)
            self._errors = (DBAPIError, self._engine.dialect.loaded_dbapi.Error)
        first = self._may_create
        self._writes = True
        try:
            if self._file is not None and first:
                Path(self._file).parent.mkdir(parents=True, exist_ok=True)
            with self._engine.begin() as connection:
                _migrate(connection)
        except self._errors as error:
            self.close()
            message = _message(error)
            if first and self._file is not None and not any(word in message for word in PASSING):
                raise OutcomesError(f"the outcomes database {self._file} cannot be used: {message}") from None
            raise UnavailableError(message) from None
        except OSError as error:
            self.close()
            if not first:
                raise UnavailableError(f"the file {self._file} is gone: {error.strerror}") from None
            raise OutcomesError(
                f"the folder of {self._file} cannot be made: {error.strerror}; choose another with --data-dir"
            ) from None
        self._may_create = False
        self._ready = True
        self.openings += 1
        return self._engine

    @contextmanager
    def transaction(self, *, write: bool) -> Iterator[Connection]:
        """Commits when the block ends without an exception.

        Raises:
            UnavailableError: the database failed; a write may or may not have been stored.
        """
        try:
            engine = self.open()
            self._check_file()
            self._writes = write
            with self._connection(engine) as connection, connection.begin():
                yield connection
            self._check_file()
        except self._errors as error:
            self.close()
            while isinstance(error.__context__, self._errors):  # a rollback that failed as well, after what it was for
                error = error.__context__
            raise UnavailableError(_message(error)) from error
        except UnavailableError:
            self.close()
            raise
        except OutcomesError as error:  # the database is another one than at start
            self.close()
            raise UnavailableError(str(error)) from None

    @contextmanager
    def _connection(self, engine: Engine) -> Iterator[Connection]:
        """A file's is kept; PostgreSQL's comes from the pool, which looks whether the server is still there."""
        if self._file is None:
            with engine.connect() as connection:
                yield connection
            return
        if self._kept is None:
            self._kept = engine.connect()
        yield self._kept

    def close(self) -> None:
        """Drop the connection; the next transaction opens a new one."""
        if self._kept is not None:
            self._kept.close()
            self._kept = None
        if self._engine is not None:
            self._engine.dispose()
        self._ready = False

    def _check_file(self) -> None:
        if self._file is None:
            return
        try:
            status = os.stat(self._file)
        except OSError as error:
            raise UnavailableError(f"the file {self._file} is gone: {error.strerror}") from None
        if (status.st_dev, status.st_ino) != self._identity:
            raise UnavailableError(f"the file {self._file} has been replaced")

    def _sqlite(self, file: str) -> Engine:
        self._file = file

        def connect() -> sqlite3.Connection:
            mode = "rwc" if self._may_create else "rw"
            connection = sqlite3.connect(
                f"file:{quote(file)}?mode={mode}",
                uri=True,
                timeout=self._timeout,
                isolation_level=None,  # transactions are begun below
                check_same_thread=False,
            )
            for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
                connection.execute(f"PRAGMA {pragma}")
            status = os.stat(file)
            self._identity = (status.st_dev, status.st_ino)
            return connection

        engine = create_engine("sqlite://", creator=connect, poolclass=QueuePool, pool_size=1, max_overflow=0)

        @event.listens_for(engine, "begin")
        def _begin(connection: Connection) -> None:
            driver = connection.connection.driver_connection
            assert driver is not None  # connected
            driver.execute("BEGIN IMMEDIATE" if self._writes else "BEGIN")

        return engine

    def _postgresql(self, url: URL) -> Engine:
        milliseconds = max(1, round(self._timeout * 1000))
        engine = create_engine(
            url,
            pool_size=1,
            max_overflow=0,
            pool_pre_ping=True,  # a server that was restarted while nothing happened costs no request
            connect_args={"connect_timeout": max(2, round(self._timeout)), "tcp_user_timeout": milliseconds},
        )

        @event.listens_for(engine, "connect")
        def _configure(connection: Any, record: Any) -> None:
            connection.autocommit = True
            connection.execute(f"SET statement_timeout = {milliseconds}")
            connection.execute(f"SET lock_timeout = {milliseconds}")
            # What is acknowledged must be on disk, whatever the role's default.
            connection.execute(
                "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
            )
            connection.autocommit = False

        return engine


def _migrate(connection: Connection) -> None:
    """Bring the tables up to date, under a lock that makes replicas which start together take turns."""
    if connection.dialect.name == "postgresql":  # SQLite's write lock is held already
        connection.execute(select(func.pg_advisory_xact_lock(MIGRATION_LOCK)))
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    config.attributes["connection"] = connection
    scripts = ScriptDirectory.from_config(config)
    version = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE}).get_current_revision()
    if version == scripts.get_current_head():
        return
    try:
        scripts.get_revision(version or "base")
    except CommandError:
        raise OutcomesError(
            f"the outcomes database has version {version}, which this release does not know; run the release that made it"
        ) from None
    if connection.dialect.name == "postgresql":  # an index over many rows takes longer than a request may wait
        connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
    command.upgrade(config, "head")


def _message(error: Exception) -> str:
    return " ".join(str(getattr(error, "orig", error)).split())
