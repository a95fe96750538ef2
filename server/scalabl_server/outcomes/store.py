"""`OutcomeStore`: how the server stores predictions and labels, called from the event loop. SQL and threads are in the
other modules.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import math
import os
import re
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from contextvars import copy_context
from datetime import UTC, datetime
from typing import TypeVar

from scalabl_server.observe.metrics import Metrics
from scalabl_server.outcomes.clock import Clock
from scalabl_server.outcomes.database import Database, UnavailableError
from scalabl_server.outcomes.operations import NewPrediction, Refusal, absent
from scalabl_server.outcomes.reader import Reader
from scalabl_server.outcomes.survey import Survey, read
from scalabl_server.outcomes.totals import TotalsCollector
from scalabl_server.outcomes.writer import Feedback, Limits, LookUp, Operation, Record, Writer
from scalabl_server.problems import ProblemError
from scalabl_server.schemas.feedback import FeedbackResponse, LabelAt, Outcome, OutcomeStatus, StoredPrediction
from scalabl_server.schemas.prediction import Prediction
from scalabl_server.settings import ServeSettings

logger = logging.getLogger("scalabl")

PREDICTION_ID = re.compile(r"pred-[0-9a-f]{32}")

SMALL = 4096  # probabilities whose JSON is made on the event loop

Result = TypeVar("Result")


class OutcomeStore:
    """Stores and looks up predictions and labels. With `--outcomes-url none` nothing is stored and feedback is refused.

    Args:
        clock: the clock to use instead of the system's, in tests.
    """

    def __init__(self, settings: ServeSettings, metrics: Metrics, clock: Clock | None = None) -> None:
        self._settings, self._metrics = settings, metrics
        self._collector = TotalsCollector()
        self._writer: Writer | None = None
        self._reader: Reader | None = None
        key = settings.input_hash_key
        self._hash_key = None if key is None else key.get_secret_value().encode()
        url = settings.resolved_outcomes_url()
        if url is None:
            return
        metrics.registry.register(self._collector)
        days = settings.outcomes_retention_days
        self._writer = Writer(
            Database(url, settings.outcomes_timeout),
            self._collector,
            metrics,
            settings.replica_id or f"{socket.gethostname()}:{settings.port or os.getpid()}",
            Limits(days * 86400, settings.outcomes_max_rows),
            clock,
        )
        self._reader = Reader(Database(url, settings.outcomes_timeout, may_create=False))

    async def start(self) -> None:
        """Open the database. If it is only unavailable at the moment, a background thread keeps trying.

        Raises:
            OutcomesError: the database cannot be used with this configuration.
        """
        if self._writer is not None:
            await asyncio.to_thread(self._writer.start)

    async def stop(self) -> None:
        """Finish the waiting operations and close the database."""
        if self._reader is not None:
            await asyncio.to_thread(self._reader.stop)
        if self._writer is not None:
            await asyncio.to_thread(self._writer.stop)

    def show(self, adapter: str) -> None:
        """Create an adapter's counters at 0, before its first prediction."""
        self._collector.show(adapter)
        self._metrics.unrecorded.labels(adapter)

    async def record(
        self,
        adapter: str,
        model: str,
        texts: Sequence[str],
        predictions: Sequence[Prediction],
        seconds: float,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> Sequence[Prediction]:
        """Store the predictions of one request, all or none, and return the predictions to answer.

        If storing fails or takes too long, the returned predictions have no id, since it could not be looked up, and
        `recorded` is false. A commit that succeeds later is stored and counted all the same.

        Args:
            seconds: time until the request's deadline.
            meanwhile: called on the event loop while the commit waits for the disk. Not called if storing fails before.

        Raises:
            ProblemError: `outcomes-unavailable`, if storing fails and `--outcomes-required` is set.
        """
        if self._writer is not None:
            values = sum(len(prediction.probabilities) for prediction in predictions)
            if values <= SMALL:
                rows = self._new_rows(adapter, model, texts, predictions)
            else:  # this would hold up the event loop
                rows = await asyncio.to_thread(self._new_rows, adapter, model, texts, predictions)
            loop, context = asyncio.get_running_loop(), copy_context()

            def committing() -> None:
                with suppress(RuntimeError):  # the event loop is closed
                    loop.call_soon_threadsafe(meanwhile, context=context)

            try:
                operation = Record(rows, committing)
                await self._ask(operation, operation.done, seconds)
                return predictions
            except ProblemError:
                self._metrics.unrecorded.labels(adapter).inc(len(rows))
                if self._settings.outcomes_required:
                    raise
        return [prediction.model_copy(update={"id": None, "recorded": False}) for prediction in predictions]

    def _new_rows(
        self, adapter: str, model: str, texts: Sequence[str], predictions: Sequence[Prediction]
    ) -> list[NewPrediction]:
        return [
            NewPrediction(
                id=str(prediction.id),
                adapter=adapter,
                model=model,
                answer=prediction.model_dump(mode="json", exclude_unset=True, exclude={"samples"}),
                input_hash=self._hash(text),
                input=text if self._settings.store_inputs else None,
            )
            for text, prediction in zip(texts, predictions, strict=True)
        ]

    async def feedback(self, outcomes: Sequence[Outcome]) -> FeedbackResponse:
        """Store labels, all or none.

        Raises:
            ProblemError: `unknown-prediction`, `invalid-field`, `outcomes-unavailable` or `outcomes-off`.
        """
        limit = self._settings.max_inputs
        if len(outcomes) > limit:
            raise ProblemError(
                "invalid-field",
                f"{len(outcomes)} labels are above the limit of {limit} per request; split the request",
                field="body",
            )
        operation = Feedback([(outcome.id, outcome.label) for outcome in outcomes])
        for position, outcome in enumerate(outcomes):
            if self._writer is not None and not PREDICTION_ID.fullmatch(outcome.id):
                raise self._refused(Refusal("unknown", position, absent(outcome.id)), len(outcomes))
        try:
            statuses = await self._ask(operation, operation.done)
        except Refusal as refusal:
            raise self._refused(refusal, len(outcomes)) from None
        for status in statuses:
            self._metrics.feedback.labels(status).inc()
        return FeedbackResponse(
            results=[
                OutcomeStatus(id=outcome.id, label=outcome.label, status=status)
                for outcome, status in zip(outcomes, statuses, strict=True)
            ]
        )

    async def look_up(self, name: str) -> StoredPrediction:
        """A stored prediction.

        Raises:
            ProblemError: `unknown-prediction`, `outcomes-unavailable` or `outcomes-off`.
        """
        operation = LookUp(name)
        stored = None
        if self._writer is None or PREDICTION_ID.fullmatch(name):
            stored = await self._ask(operation, operation.done)
        if stored is None:
            raise ProblemError("unknown-prediction", absent(name))
        labels = [LabelAt(label=label, labelled_at=_time(at)) for label, at in stored.labels]
        return StoredPrediction(
            id=stored.id,
            model=stored.model,
            adapter=stored.adapter,
            created_at=_time(stored.created_at),
            prediction=stored.answer,
            input_hash=stored.input_hash,
            input=stored.input,
            labelled=bool(labels),
            label=labels[-1].label if labels else None,
            labels=labels,
        )

    async def survey(self, adapter: str) -> Survey | None:
        """What is stored about an adapter, for the dashboard; None if this server stores nothing.

        Raises:
            ProblemError: `outcomes-unavailable`.
        """
        if self._reader is None:
            return None
        try:
            async with asyncio.timeout(self._settings.outcomes_timeout):
                return await asyncio.wrap_future(self._reader.submit(lambda connection: read(connection, adapter)))
        except (UnavailableError, TimeoutError):
            raise self._unavailable() from None

    async def _ask(self, operation: Operation, done: Future[Result], seconds: float = math.inf) -> Result:
        if self._writer is None:
            raise ProblemError(
                "outcomes-off", "this server stores no predictions; to use feedback, start it without '--outcomes-url none'"
            )
        try:
            self._writer.submit(operation)
            async with asyncio.timeout(min(seconds, self._settings.outcomes_timeout)):
                return await asyncio.wrap_future(done)
        except (UnavailableError, TimeoutError):
            raise self._unavailable() from None

    def _hash(self, text: str) -> str:
        data = text.encode("utf-8", "surrogatepass")
        if self._hash_key is None:
            return hashlib.sha256(data).hexdigest()
        return hmac.new(self._hash_key, data, hashlib.sha256).hexdigest()

    @staticmethod
    def _unavailable() -> ProblemError:
        return ProblemError(
            "outcomes-unavailable", "the outcomes database is unavailable at the moment; try again later", retry_after=1
        )

    @staticmethod
    def _refused(refusal: Refusal, count: int) -> ProblemError:
        where = f"{refusal.position}." if count > 1 else ""
        note = "; no label of this request was stored" if count > 1 else ""
        if refusal.kind == "unknown":
            return ProblemError("unknown-prediction", f"{refusal.detail}{note}", field=f"{where}id")
        return ProblemError("invalid-field", f"{refusal.detail}{note}", field=f"{where}label")


def _time(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
