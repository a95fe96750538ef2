"""A full, locked, missing or stopped database and a wrong clock: what clients see, and that the server recovers."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tests.integration.support.process import write_models
from tests.integration.support.replicas import Replica, postgres, running, wait_until

pytestmark = pytest.mark.integration

MEGABYTE = 2**20


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("faults"))


def _suffers_and_recovers(replica: Replica, fail: Callable[[], None], repair: Callable[[], None]) -> None:
    """Before, during and after a fault of the database."""
    (before,) = replica.predict("the sea")
    (labelled,) = replica.predict("the sky")
    assert replica.feedback([(labelled["id"], "red")]).status_code == 200

    fail()
    wait_until(lambda: not replica.predict("filler " * 8)[0]["recorded"])  # a full disk may have room for a few yet
    wait_until(lambda: replica.totals()["scalabl_outcomes_up"] == 0)
    for _ in range(3):
        (during,) = replica.predict("the sea")
        assert (during["id"], during["recorded"]) == (None, False)
        assert during["probabilities"] == before["probabilities"]
        response = replica.feedback([(before["id"], "blue")])
        assert (response.status_code, response.headers["retry-after"]) == (503, "1")
        assert response.json()["type"] == "urn:scalabl:problem:outcomes-unavailable"
        assert replica.client.get(f"/predictions/{before['id']}").status_code == 503
    assert replica.client.get("/health/ready").status_code == 200
    counted = replica.totals()  # a scrape needs no database
    assert counted["scalabl_outcomes_total"] == 1
    assert counted["scalabl_predictions_unrecorded_total"] >= 4

    repair()
    wait_until(lambda: bool(replica.predict("the sea")[0]["recorded"]))
    assert replica.feedback([(before["id"], "blue")]).json()["results"][0]["status"] == "recorded"
    assert replica.feedback([(labelled["id"], "red")]).json()["results"][0]["status"] == "unchanged"
    (after,) = replica.predict("the sea")
    assert after["probabilities"] == before["probabilities"]
    assert replica.client.get(f"/predictions/{after['id']}").json()["prediction"] == after
    counted = replica.totals()
    assert counted["scalabl_outcomes_up"] == 1
    assert counted["scalabl_outcomes_total"] == 2

    replica.kill()  # and what was acknowledged is on disk
    replica.start()
    replica.wait()
    assert replica.client.get(f"/predictions/{before['id']}").json()["label"] == "blue"
    assert replica.totals()["scalabl_outcomes_total"] == 2


@contextmanager
def _small_disk(folder: Path) -> Iterator[tuple[list[str], Path]]:
    """Three megabytes mounted on `folder`, where only some see it: (prefix of a command that does, a path to it for us)."""
    script = f"mount -t tmpfs -o size=3m tmpfs {folder} && echo mounted && exec sleep infinity"
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as holder:
        try:
            assert holder.stdout is not None
            if holder.stdout.readline() != b"mounted\n":
                pytest.skip("unshare cannot mount a small disk; allow user namespaces")
            enter = ["nsenter", f"--target={holder.pid}", "--user", "--mount", "--preserve-credentials", "--"]
            yield enter, Path(f"/proc/{holder.pid}/root{folder}")
        finally:
            holder.kill()


def _write_for_ever(path: Path) -> None:
    with path.open("wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


def test_a_full_disk(models: Path, tmp_path: Path) -> None:
    with _small_disk(tmp_path) as (enter, disk):
        assert shutil.disk_usage(disk).total == 3 * MEGABYTE
        filler = disk / "filler"

        def fill() -> None:
            with pytest.raises(OSError, match="No space left"):
                _write_for_ever(filler)

        replica = Replica(models, "full", f"sqlite:///{tmp_path}/outcomes.db", prefix=enter)
        with running(replica):
            _suffers_and_recovers(replica, fill, filler.unlink)
            assert (disk / "outcomes.db").exists()


def test_a_locked_database(models: Path, tmp_path: Path) -> None:
    file = tmp_path / "outcomes.db"
    replica = Replica(models, "locked", f"sqlite:///{file}", "--outcomes-timeout", "0.5")
    with running(replica), closing(sqlite3.connect(file, isolation_level=None)) as other:
        _suffers_and_recovers(replica, lambda: _execute(other, "BEGIN IMMEDIATE"), lambda: _execute(other, "ROLLBACK"))


def _execute(connection: sqlite3.Connection, statement: str) -> None:
    connection.execute(statement)


def test_a_database_file_that_vanishes(models: Path, tmp_path: Path) -> None:
    folder, away = tmp_path / "data", tmp_path / "away"
    replica = Replica(models, "vanished", f"sqlite:///{folder}/outcomes.db")
    with running(replica):
        _suffers_and_recovers(replica, lambda: _rename(folder, away), lambda: _rename(away, folder))


def _rename(before: Path, after: Path) -> None:
    before.rename(after)
    assert not before.exists()


def test_a_postgresql_that_stops(models: Path) -> None:
    with postgres() as server:
        replica = Replica(models, "stopped", server.url)
        with running(replica):
            _suffers_and_recovers(replica, server.stop, server.start)


def test_a_postgresql_that_is_restarted_in_a_quiet_moment_costs_no_answer(models: Path) -> None:
    with postgres() as server:
        replica = Replica(models, "restarted", server.url)
        with running(replica):
            (before,) = replica.predict("the sea")
            server.stop()
            server.start()
            (after,) = replica.predict("the sea")
            assert after["recorded"]
            assert replica.feedback([(before["id"], "red"), (after["id"], "red")]).status_code == 200


def test_a_postgresql_that_comes_up_after_the_server(models: Path) -> None:
    with postgres() as server:
        server.stop()
        replica = Replica(models, "early", server.url)
        with running(replica):
            assert replica.predict("the sea")[0]["recorded"] is False
            assert "scalabl_outcomes_total" not in replica.totals()  # unknown, which is not 0
            server.start()
            wait_until(lambda: bool(replica.predict("the sea")[0]["recorded"]))
            assert replica.totals()["scalabl_outcomes_total"] == 0


def test_a_clock_that_jumps(models: Path, tmp_path: Path) -> None:
    library = next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"), None)
    if library is None:
        pytest.skip("libfaketime is missing; apt-get install faketime")
    clock = tmp_path / "clock"
    env = {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    clock.write_text("+0")
    replica = Replica(models, "jumps", f"sqlite:///{tmp_path}/outcomes.db", "--outcomes-retention-days", "1", env=env)
    with running(replica):
        predictions = replica.predict(["a", "b", "c", "d"])

        def label(at: int) -> dict[str, Any]:
            assert replica.feedback([(predictions[at]["id"], "red")]).json()["results"][0]["status"] == "recorded"
            return dict(replica.client.get(f"/predictions/{predictions[at]['id']}").json())

        label(0)
        small = replica.totals()["scalabl_label_delay_seconds_sum"]
        assert 0 <= small < 60
        clock.write_text("+20d")
        stored = label(1)
        assert datetime.fromisoformat(stored["labels"][0]["labelled_at"]) > datetime.now(UTC) + timedelta(days=19)
        large = replica.totals()["scalabl_label_delay_seconds_sum"]
        assert large == pytest.approx(20 * 86400, abs=120)
        assert "the clock jumped by +1728" in replica.log.read_text()
        clock.write_text("-20d")
        label(2)
        assert replica.totals()["scalabl_label_delay_seconds_sum"] == large  # not less
        (answer,) = replica.predict("a")
        assert answer["probabilities"] == pytest.approx(predictions[0]["probabilities"], abs=1e-5)
        clock.write_text("+0")
        label(3)
        assert replica.totals()["scalabl_outcomes_total"] == 4
        statuses = [replica.client.get(f"/predictions/{prediction['id']}").status_code for prediction in predictions]
        assert statuses == [200] * 4
