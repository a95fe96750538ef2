"""The connection to the outcomes database: opened and migrated when first needed, reopened after a failure. Queries and
inserts are in the other modules.
"""

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
TEMPORARY = ("locked", "busy", "full")  # words in SQLite's messages about errors that can end by themselves


class OutcomesError(ScalaBLError):
    """The outcomes database cannot be used with this configuration. The message says what to change."""


class UnavailableError(Exception):
    """The database cannot be reached or written at the moment."""


def parse_url(text: str) -> URL:
    """Parse `--outcomes-url` into a SQLAlchemy URL with the driver that this package uses.

    Raises:
        OutcomesError: the URL is neither that of a SQLite file nor that of PostgreSQL, or the driver is not installed.
    """
    advice = "use sqlite:////path/to/file, postgresql://user@host/database or none"
    try:
        url = make_url(text)
    except ArgumentError:
        raise OutcomesError(f"--outcomes-url is not a database URL; {advice}") from None
    backend = url.get_backend_name()
    if backend == "sqlite":
        if not url.database or ":memory:" in url.database or url.query:
            raise OutcomesError(f"--outcomes-url: SQLite needs the path of a file, without parameters; {advice}")
        return url.set(drivername="sqlite", database=os.path.abspath(url.database))
    if backend not in ("postgresql", "postgres"):
        raise OutcomesError(f"--outcomes-url: {backend} is not supported; {advice}")
    try:
        import psycopg  # noqa: F401  (only to see whether it is installed; SQLAlchemy imports it)
    except ImportError:
        raise OutcomesError(
            "--outcomes-url: PostgreSQL needs a driver; install it with: pip install 'scalabl[postgres]'"
        ) from None
    return url.set(drivername="postgresql+psycopg")


class Database:
    """One connection, used by one thread at a time.

    If a SQLite file is moved or replaced while it is open, writes would go to a file that nobody finds again. Therefore the
    file's device and inode are compared before each transaction and after each commit. A missing file is not created again
    while the process runs, since all stored predictions would be lost; the server waits until the file is back.

    Args:
        url: see `parse_url`; parsed when the database is opened.
        timeout: seconds to wait for a lock, a connection or a statement.
        may_create: whether a missing SQLite file may be created.
    """

    def __init__(self, url: str, timeout: float, *, may_create: bool = True) -> None:
        self._url, self._timeout = url, timeout
        self._engine: Engine | None = None
        self._file: str | None = None
        self._identity: tuple[int, int] | None = None
        self._may_create = may_create
        self._ready = False
        self._sqlite_connection: Connection | None = None
        self._writes = True  # whether the next transaction writes
        # Also the driver's own errors, since hooks and `PreparedInsert` call the driver directly.
        self._errors: tuple[type[Exception], ...] = (DBAPIError,)
        self.openings = 0  # how often it was opened; after a new opening the contents may have changed

    def open(self) -> Engine:
        """Connect and migrate the tables. Does nothing if the database is open already.

        Raises:
            UnavailableError: the database cannot be used at the moment.
            OutcomesError: the database cannot be used with this configuration.
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
            if first and self._file is not None and not any(word in message for word in TEMPORARY):
                raise OutcomesError(f"the outcomes database {self._file} cannot be used: {message}") from None
            raise UnavailableError(message) from None
        except OSError as error:
            self.close()
            if not first:
                raise UnavailableError(f"the file {self._file} cannot be accessed: {error.strerror}") from None
            raise OutcomesError(
                f"the folder of {self._file} cannot be created: {error.strerror}; choose another with --data-dir"
            ) from None
        self._may_create = False
        self._ready = True
        self.openings += 1
        return self._engine

    @contextmanager
    def transaction(self, *, write: bool) -> Iterator[Connection]:
        """A transaction that is committed when the block ends without an exception.

        Raises:
            UnavailableError: the database failed. It is not known whether the writes were stored.
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
            while isinstance(error.__context__, self._errors):  # the rollback failed too: report the first error
                error = error.__context__
            raise UnavailableError(_message(error)) from error
        except UnavailableError:
            self.close()
            raise
        except OutcomesError as error:  # the database was replaced after start-up by one that cannot be used
            self.close()
            raise UnavailableError(str(error)) from None

    @contextmanager
    def _connection(self, engine: Engine) -> Iterator[Connection]:
        """The open connection to a SQLite file, or one from PostgreSQL's pool, which checks that it is still alive."""
        if self._file is None:
            with engine.connect() as connection:
                yield connection
            return
        if self._sqlite_connection is None:
            self._sqlite_connection = engine.connect()
        yield self._sqlite_connection

    def close(self) -> None:
        """Close the connection. The next transaction opens a new one."""
        if self._sqlite_connection is not None:
            self._sqlite_connection.close()
            self._sqlite_connection = None
        if self._engine is not None:
            self._engine.dispose()
        self._ready = False

    def _check_file(self) -> None:
        if self._file is None:
            return
        try:
            status = os.stat(self._file)
        except OSError as error:
            raise UnavailableError(f"the file {self._file} cannot be accessed: {error.strerror}") from None
        if (status.st_dev, status.st_ino) != self._identity:
            raise UnavailableError(f"the file {self._file} was replaced by another file")

    def _sqlite(self, file: str) -> Engine:
        self._file = file

        def connect() -> sqlite3.Connection:
            mode = "rwc" if self._may_create else "rw"
            connection = sqlite3.connect(
                f"file:{quote(file)}?mode={mode}",
                uri=True,
                timeout=self._timeout,
                isolation_level=None,  # `_begin` below begins transactions
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
            assert driver is not None  # the connection is open
            driver.execute("BEGIN IMMEDIATE" if self._writes else "BEGIN")

        return engine

    def _postgresql(self, url: URL) -> Engine:
        milliseconds = max(1, round(self._timeout * 1000))
        engine = create_engine(
            url,
            pool_size=1,
            max_overflow=0,
            pool_pre_ping=True,  # so that no request fails after PostgreSQL was restarted between requests
            connect_args={"connect_timeout": max(2, round(self._timeout)), "tcp_user_timeout": milliseconds},
        )

        @event.listens_for(engine, "connect")
        def _configure(connection: Any, record: Any) -> None:
            connection.autocommit = True
            connection.execute(f"SET statement_timeout = {milliseconds}")
            connection.execute(f"SET lock_timeout = {milliseconds}")
            # An acknowledged write must be on disk, even if the role's default is different.
            connection.execute(
                "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
            )
            connection.autocommit = False

        return engine


def _migrate(connection: Connection) -> None:
    """Migrate the tables to the current version, under a lock, so that replicas that start together take turns.

    Raises:
        OutcomesError: the database has a version that this release does not know.
    """
    if connection.dialect.name == "postgresql":  # with SQLite the transaction holds the write lock already
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
            f"the outcomes database has version {version}, which this release does not know; run the release that created it"
        ) from None
    if connection.dialect.name == "postgresql":  # building an index over many rows takes longer than the usual limit
        connection.exec_driver_sql("SET LOCAL statement_timeout = 0")
    command.upgrade(config, "head")


def _message(error: Exception) -> str:
    return " ".join(str(getattr(error, "orig", error)).split())
