"""Group commit: one thread combines waiting operations into one transaction. They are confirmed once they are on disk.

The SQL is in `operations` and `totals`.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from sqlalchemy import Connection, select
from sqlalchemy.dialects import postgresql, sqlite

from scalabl_server.observe.metrics import Metrics
from scalabl_server.outcomes import operations, totals
from scalabl_server.outcomes.clock import Clock
from scalabl_server.outcomes.database import Database, UnavailableError
from scalabl_server.outcomes.operations import LabelRound, NewPrediction, Refusal, Status, Stored
from scalabl_server.outcomes.tables import REPLICAS
from scalabl_server.outcomes.totals import Additions, TotalsCollector

logger = logging.getLogger("scalabl")

PROBE_SECONDS = 0.5  # between attempts while the database is down
CHORE_SECONDS = 60.0  # between deletions of expired predictions
GROUP_ROWS = 2048  # predictions and labels in one transaction; the last operation may exceed it
DELETED_AT_ONCE = 500


@dataclass(eq=False)
class Record:
    """Predictions to store. The writer's thread calls `committing` when only the commit to disk is left."""

    predictions: Sequence[NewPrediction]
    committing: Callable[[], None] = lambda: None
    done: Future[None] = field(default_factory=Future)

    def __len__(self) -> int:
        return len(self.predictions)


@dataclass(eq=False)
class Feedback:
    """(prediction id, label) pairs to store, all or none. The label None: none of the choices."""

    labels: Sequence[tuple[str, str | None]]
    done: Future[list[Status]] = field(default_factory=Future)

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(eq=False)
class LookUp:
    """The id of a prediction to look up."""

    id: str
    done: Future[Stored | None] = field(default_factory=Future)

    def __len__(self) -> int:
        return 1


Operation = Record | Feedback | LookUp


@dataclass(frozen=True)
class Limits:
    """How long stored predictions stay: the largest age in seconds (None: no limit) and the largest number."""

    max_age: float | None
    max_rows: int


class Writer:
    """Runs all writes, and look-ups by id, on a thread of its own.

    While the database is down, every operation fails at once, and the thread tries to reach it twice a second.
    """

    def __init__(
        self,
        database: Database,
        collector: TotalsCollector,
        metrics: Metrics,
        replica: str,
        limits: Limits,
        clock: Clock | None = None,
    ) -> None:
        self._database, self._collector, self._metrics = database, collector, metrics
        self._replica, self._limits, self._clock = replica, limits, clock or Clock()
        self._incarnation = uuid.uuid4().hex
        self._queue: queue.SimpleQueue[Operation | None] = queue.SimpleQueue()
        self._down: str | None = "it has not been opened yet"  # the reason why the database is down, None if it is up
        self._totals_of = 0  # `Database.openings` when the totals in memory were loaded
        self._next_chore = time.monotonic() + CHORE_SECONDS
        self._claimed = False  # whether this process has put its mark into the replica's row
        self._closing = False  # new operations are refused
        self._stopping = False  # the last accepted operation has been read from the queue
        self._thread = threading.Thread(target=self._run, name="outcomes", daemon=True)

    def start(self) -> None:
        """Open the database and start the thread. If the database is only down at the moment, the thread keeps trying.

        Raises:
            OutcomesError: the database cannot be used with this configuration.
        """
        try:
            self._database.open()
        except UnavailableError as error:
            self._went_down(str(error))
        else:
            self._probe()
        self._thread.start()

    def stop(self) -> None:
        """Finish the waiting operations and close the database."""
        if self._thread.ident is None:
            return
        self._closing = True
        self._queue.put(None)
        self._thread.join()

    def submit(self, operation: Operation) -> None:
        """Queue an operation. Its future `done` gets the result once the transaction is on disk.

        Raises:
            UnavailableError: the database is down, or the server is shutting down.
        """
        if self._closing:
            raise UnavailableError("the server is shutting down")
        if self._down is not None:
            raise UnavailableError(self._down)
        self._queue.put(operation)

    def _run(self) -> None:
        while not self._stopping:
            pause = PROBE_SECONDS if self._down is not None else max(0.0, self._next_chore - time.monotonic())
            group = self._gather(pause)
            if group:
                self._commit(group)
            elif self._down is not None:
                self._probe()
            if self._down is None and time.monotonic() >= self._next_chore:
                self._chores()
        self._down = "the server is shutting down"
        self._database.close()
        while not self._queue.empty():  # operations that were queued during the last transaction
            operation = self._queue.get_nowait()
            if operation is not None and operation.done.set_running_or_notify_cancel():
                _fail([operation], UnavailableError("the server is shutting down"))

    def _gather(self, pause: float) -> list[Operation]:
        """The waiting operations, up to GROUP_ROWS rows. Waits up to `pause` seconds for the first one."""
        group: list[Operation] = []
        rows = 0
        try:
            operation = self._queue.get(timeout=pause)
            while operation is not None:
                if operation.done.set_running_or_notify_cancel():
                    group.append(operation)
                    rows += len(operation)
                if rows >= GROUP_ROWS:
                    return group
                operation = self._queue.get_nowait()
            self._stopping = True
        except queue.Empty:
            pass
        return group

    def _commit(self, group: list[Operation]) -> None:
        if self._down is not None:  # they were queued before the failure was noticed
            _fail(group, UnavailableError(self._down))
            return
        started = time.perf_counter()
        additions = Additions()
        answers: dict[Operation, list[Status] | Stored | Refusal | None] = {}
        write = not all(isinstance(operation, LookUp) for operation in group)
        try:
            with self._database.transaction(write=write) as connection:
                self._load_totals(connection)
                now = self._clock.now()
                new = [
                    prediction
                    for operation in group
                    if isinstance(operation, Record)
                    for prediction in operation.predictions
                ]
                operations.insert_predictions(connection, new, now, additions)
                delays = self._take_labels(connection, group, now, additions, answers)
                for operation in group:
                    if isinstance(operation, LookUp):
                        answers[operation] = operations.look_up(connection, operation.id)
                changed = totals.save(connection, self._replica, additions)
                for operation in group:
                    if isinstance(operation, Record):
                        operation.committing()
        except UnavailableError as error:
            self._went_down(str(error))
            _fail(group, error)
            return
        except Exception:
            logger.exception("an unexpected error in a transaction of the outcomes database; its operations have failed")
            self._metrics.outcomes_errors.inc()
            _fail(group, UnavailableError("an unexpected error"))
            return
        self._collector.update(changed)
        if write:
            self._metrics.outcomes_commit_duration.observe(time.perf_counter() - started)
        for adapter, seconds in delays:
            self._metrics.label_delay.labels(adapter).observe(seconds)
        for operation in group:
            answer = answers.get(operation)
            if isinstance(answer, Refusal):
                operation.done.set_exception(answer)
            else:
                operation.done.set_result(answer)  # type: ignore[arg-type]  # each operation got its own kind

    def _take_labels(
        self,
        connection: Connection,
        group: list[Operation],
        now: float,
        additions: Additions,
        answers: dict[Operation, list[Status] | Stored | Refusal | None],
    ) -> list[tuple[str, float]]:
        requests = [operation for operation in group if isinstance(operation, Feedback)]
        if not requests:
            return []
        labels = LabelRound.read(connection, (name for request in requests for name, _ in request.labels), now)
        for request in requests:
            try:
                answers[request] = labels.take(request.labels, self._replica, additions)
            except Refusal as refusal:
                answers[request] = refusal
        labels.write(connection)
        return labels.delays

    def _load_totals(self, connection: Connection) -> None:
        if self._totals_of != self._database.openings:
            self._collector.replace(totals.load(connection, self._replica))
            self._totals_of = self._database.openings

    def _probe(self) -> None:
        """Try a small write. If it succeeds, the database is up again."""
        try:
            with self._database.transaction(write=True) as connection:
                self._load_totals(connection)
                self._claim(connection)
        except UnavailableError as error:
            self._went_down(str(error))
            return
        except Exception:
            logger.exception("an unexpected error in a test write to the outcomes database")
            self._went_down("an unexpected error; the log has the traceback")
            return
        if self._down is not None:
            logger.info("the outcomes database is ready")
        self._down = None
        self._metrics.outcomes_up.set(1)

    def _went_down(self, reason: str) -> None:
        self._metrics.outcomes_errors.inc()
        if reason != self._down:
            logger.error("the outcomes database is down: %s", reason)
        self._down = reason
        self._metrics.outcomes_up.set(0)

    def _claim(self, connection: Connection) -> None:
        """Write this process's mark into the replica's row; log an error if another process has replaced it meanwhile."""
        incarnation = connection.execute(
            select(REPLICAS.c.incarnation).where(REPLICAS.c.replica == self._replica)
        ).scalar_one_or_none()
        if self._claimed and incarnation not in (None, self._incarnation):
            logger.error(
                "another server writes outcomes as replica %r, so sums over replicas count the predictions of both twice; "
                "give each server its own --replica-id",
                self._replica,
            )
        self._claimed = True
        row = {"replica": self._replica, "incarnation": self._incarnation, "seen_at": self._clock.now()}
        insert = (sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert)(REPLICAS)
        changed = {name: insert.excluded[name] for name in ("incarnation", "seen_at")}
        connection.execute(insert.on_conflict_do_update(index_elements=["replica"], set_=changed), row)

    def _chores(self) -> None:
        """Delete some of the predictions that have expired or exceed the limit on their number."""
        now = self._clock.now()
        age = self._limits.max_age
        older_than = now - age if age is not None and self._clock.trusted() else None
        try:
            with self._database.transaction(write=True) as connection:
                self._load_totals(connection)
                self._claim(connection)
                count = operations.delete_oldest(
                    connection, older_than=older_than, max_rows=self._limits.max_rows, limit=DELETED_AT_ONCE
                )
        except UnavailableError as error:
            self._went_down(str(error))
            return
        except Exception:
            logger.exception("an unexpected error while deleting the oldest predictions")
            self._went_down("an unexpected error; the log has the traceback")
            return
        self._metrics.outcomes_deleted.inc(count)
        # Delete the rest soon, but let waiting operations go first.
        self._next_chore = time.monotonic() + (0.01 if count == DELETED_AT_ONCE else CHORE_SECONDS)


def _fail(group: list[Operation], error: UnavailableError) -> None:
    for operation in group:
        operation.done.set_exception(error)
