"""The outcomes database itself: migrations, a file that vanishes, a clock that jumps, two servers with one replica id."""

from __future__ import annotations

import logging
import sqlite3
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from scalabl_server.observe.metrics import Metrics
from scalabl_server.outcomes.clock import Clock
from scalabl_server.outcomes.database import Database, UnavailableError
from scalabl_server.outcomes.operations import NewPrediction, Stored, insert_predictions
from scalabl_server.outcomes.prepared import ROWS
from scalabl_server.outcomes.tables import METADATA, VERSION_TABLE
from scalabl_server.outcomes.totals import Additions, TotalsCollector, save
from scalabl_server.outcomes.writer import Feedback, Limits, LookUp, Record, Writer
from sqlalchemy import Connection

from tests.server.conftest import wait_until
from tests.server.outcomes.test_counters import answer_of

MakeWriter = Callable[..., Writer]
DAY = 86400.0


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "data" / "outcomes.db"


@pytest.fixture
def make(file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeWriter]:
    """Starts writers on the file. They delete expired predictions twenty times a second."""
    monkeypatch.setattr("scalabl_server.outcomes.writer.CHORE_SECONDS", 0.05)
    monkeypatch.setattr("scalabl_server.outcomes.writer.PROBE_SECONDS", 0.02)
    started = []

    def start(clock: Clock | None = None, replica: str = "r", metrics: Metrics | None = None) -> Writer:
        database = Database(f"sqlite:///{file}", 2)
        writer = Writer(database, TotalsCollector(), metrics or Metrics(), replica, Limits(30 * DAY, 1000), clock)
        writer.start()
        started.append(writer)
        return writer

    yield start
    for writer in started:
        writer.stop()


def _record(writer: Writer) -> str:
    name = f"pred-{uuid.uuid4().hex}"
    operation = Record([NewPrediction(name, "a", "m", answer_of([0.5, 0.3, 0.2]), "", None)])
    writer.submit(operation)
    operation.done.result(10)
    return name


def _stored(writer: Writer, name: str) -> Stored | None:
    operation = LookUp(name)
    writer.submit(operation)
    return operation.done.result(10)


def _recorded(writer: Writer) -> bool:
    try:
        return bool(_record(writer))
    except UnavailableError:
        return False


def test_the_migrations_make_the_tables_of_the_code(file: Path) -> None:
    database = Database(f"sqlite:///{file}", 2)
    with database.transaction(write=True) as connection:
        context = MigrationContext.configure(connection, opts={"version_table": VERSION_TABLE, "compare_type": True})
        assert compare_metadata(context, METADATA) == []
    database.close()


def test_writes_reach_the_disk_before_they_count(file: Path) -> None:
    database = Database(f"sqlite:///{file}", 2)
    with database.transaction(write=True) as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL
    database.close()


def test_a_lost_connection_is_named_and_not_the_rollback_that_it_makes_fail(file: Path) -> None:
    database = Database(f"sqlite:///{file}", 2)

    def lose(connection: Connection) -> None:
        connection.connection.driver_connection.close()  # type: ignore[union-attr]  # it is connected
        raise sqlite3.OperationalError("first cause")

    with pytest.raises(UnavailableError, match="first cause"), database.transaction(write=True) as connection:
        lose(connection)
    with database.transaction(write=True) as connection:
        assert connection.exec_driver_sql("SELECT 1").scalar() == 1
    database.close()


def test_more_rows_than_one_statement_takes_are_stored_and_counted_all(file: Path) -> None:
    database, count = Database(f"sqlite:///{file}", 2), 2 * ROWS + 1
    new = [NewPrediction(f"pred-{n}", f"a{n}", "m", answer_of([0.5, 0.3, 0.2]), "", None) for n in range(count)]
    for times in (1, 2):
        additions = Additions()
        with database.transaction(write=True) as connection:
            insert_predictions(connection, new if times == 1 else [], 1.0, additions)
            additions.values = {(f"a{n}", "predictions", "0.533"): 1.0 for n in range(count)}
            assert save(connection, "r", additions) == dict.fromkeys(additions.values, float(times))
            assert connection.exec_driver_sql("SELECT count(DISTINCT id) FROM scalabl_predictions").scalar() == count
    database.close()


def test_servers_that_start_together_make_one_database(file: Path) -> None:
    # CPython 3.11 may fail when several threads compile at once (gh-106905): this compiles the migrations beforehand.
    Database(f"sqlite:///{file.with_name('first.db')}", 10).open()
    databases = [Database(f"sqlite:///{file}", 10) for _ in range(8)]
    barrier = threading.Barrier(len(databases))

    def start(database: Database) -> None:
        barrier.wait()
        database.open()
        database.close()

    with ThreadPoolExecutor(len(databases)) as pool:
        for done in [pool.submit(start, database) for database in databases]:
            done.result(30)
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("SELECT count(*) FROM scalabl_version").fetchall() == [(1,)]


def test_a_file_that_vanished_takes_nothing_until_it_is_back(make: MakeWriter, file: Path) -> None:
    writer = make()
    name = _record(writer)
    away = file.parent.with_name("away")
    file.parent.rename(away)
    assert not _recorded(writer)
    assert not file.parent.exists()  # no new database in its place: that would forget the predictions
    away.rename(file.parent)
    wait_until(lambda: _recorded(writer))
    assert _stored(writer, name) is not None


def test_a_file_that_was_replaced_is_opened_anew(make: MakeWriter, file: Path) -> None:
    writer = make()
    name = _record(writer)
    for each in file.parent.iterdir():
        each.rename(each.with_name(f"old-{each.name}"))
    Database(f"sqlite:///{file}", 2).open()
    wait_until(lambda: _recorded(writer))
    assert _stored(writer, name) is None
    (row,) = sqlite3.connect(file).execute("SELECT value FROM scalabl_totals WHERE name = 'predictions'").fetchall()
    assert row[0] >= 1


class Hands:
    """A clock that the test sets."""

    def __init__(self) -> None:
        self.wall, self.monotonic = 1.8e9, 1000.0
        self.clock = Clock(lambda: self.wall, lambda: self.monotonic)

    def pass_time(self, seconds: float) -> None:
        self.wall += seconds
        self.monotonic += seconds


def test_predictions_expire_by_age(make: MakeWriter) -> None:
    hands = Hands()
    writer = make(hands.clock)
    old = _record(writer)
    hands.pass_time(20 * DAY)
    young = _record(writer)
    hands.pass_time(11 * DAY)
    wait_until(lambda: _stored(writer, old) is None)
    assert _stored(writer, young) is not None


def test_a_clock_that_jumps_ahead_deletes_nothing_for_an_hour(make: MakeWriter, caplog: pytest.LogCaptureFixture) -> None:
    hands = Hands()
    metrics = Metrics()
    writer = make(hands.clock, metrics=metrics)
    name = _record(writer)
    hands.wall += 365 * DAY
    with caplog.at_level(logging.WARNING, "scalabl"):
        wait_until(lambda: "the clock jumped by +31536000 s" in caplog.text)
    for _ in range(5):
        _record(writer)
    assert _stored(writer, name) is not None
    hands.pass_time(3601)  # the clock was right after all
    wait_until(lambda: _stored(writer, name) is None)


def test_a_clock_that_jumps_back_makes_no_negative_delay(make: MakeWriter) -> None:
    hands = Hands()
    metrics = Metrics()
    writer = make(hands.clock, metrics=metrics)
    first, second = _record(writer), _record(writer)
    hands.pass_time(100)
    _label(writer, first)
    hands.wall -= 10 * DAY
    _label(writer, second)
    assert metrics.registry.get_sample_value("scalabl_label_delay_seconds_sum", {"adapter": "a"}) == pytest.approx(100)
    assert metrics.registry.get_sample_value("scalabl_label_delay_seconds_count", {"adapter": "a"}) == 2


def _label(writer: Writer, name: str) -> None:
    operation = Feedback([(name, "red")])
    writer.submit(operation)
    assert operation.done.result(10) == ["recorded"]


def test_two_servers_under_one_replica_name_are_reported(make: MakeWriter, caplog: pytest.LogCaptureFixture) -> None:
    make(replica="same")
    with caplog.at_level(logging.ERROR, "scalabl"):
        make(replica="same")
        wait_until(lambda: "another server writes outcomes as replica 'same'" in caplog.text)


def test_a_restarted_server_is_no_second_one(make: MakeWriter, caplog: pytest.LogCaptureFixture) -> None:
    make().stop()
    writer = make()
    with caplog.at_level(logging.ERROR, "scalabl"):
        hands = [_record(writer) for _ in range(3)]
        assert all(_stored(writer, name) for name in hands)
    assert "another server" not in caplog.text


def test_stopping_finishes_what_waits(make: MakeWriter) -> None:
    writer = make()
    waiting = [Record([NewPrediction(f"pred-{n:032x}", "a", "m", answer_of([1, 0, 0]), "", None)]) for n in range(50)]
    for operation in waiting:
        writer.submit(operation)
    writer.stop()
    assert all(operation.done.result(0) is None for operation in waiting)
