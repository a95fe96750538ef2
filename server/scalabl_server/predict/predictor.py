"""The order of the steps that answer a `/predict` request: checks, admission, tokenising, passes, answer, storage.

Each step is implemented in a module of its own. The start and stop of the server are in `lifetime`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from scalabl.uncertainty.predictive import Predictive
from scalabl_server.batching.admission import Admission, Place
from scalabl_server.batching.batcher import Batcher
from scalabl_server.batching.jobs import Job
from scalabl_server.batching.threads import OneAtATime
from scalabl_server.engines.interface import Engine, Served
from scalabl_server.observe import trace
from scalabl_server.observe.metrics import Metrics
from scalabl_server.outcomes.store import OutcomeStore
from scalabl_server.predict.answers import answers_of, cut, is_small, warnings_of
from scalabl_server.predict.preparation import encode, is_short, jobs_for, slices
from scalabl_server.predict.request import CheckedRequest, read_request
from scalabl_server.problems import ProblemError
from scalabl_server.schemas.prediction import Prediction, PredictRequest, PredictResponse, Usage

logger = logging.getLogger("scalabl")

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class _Computed:
    """The computed answers of a request, in the order of its inputs; its warnings; and the batch rows that it took."""

    outcomes: list[Predictive]
    predictions: list[Prediction]
    warnings: list[str]
    rows: int


class Predictor:
    """Answers requests with a loaded engine.

    Args:
        prompt_thread: the only thread that uses tokenizers, because they are not thread-safe.
        answer_threads: compute large answers off the event loop.

    Attributes:
        in_flight: the number of requests between admission and answer.
    """

    def __init__(
        self,
        engine: Engine,
        batcher: Batcher[Served],
        admission: Admission,
        outcomes: OutcomeStore,
        metrics: Metrics,
        prompt_thread: OneAtATime,
        answer_threads: Executor,
    ) -> None:
        self._engine, self._batcher, self._admission = engine, batcher, admission
        self._outcomes, self._metrics = outcomes, metrics
        self._prompt_thread, self._answer_threads = prompt_thread, answer_threads
        self.in_flight = 0

    async def predict(
        self, request: PredictRequest, timeout: float | None, form: Callable[[PredictResponse], Answer]
    ) -> Answer:
        """Answer one request.

        Args:
            timeout: seconds until the request's deadline; the setting `request_timeout` is the default and the maximum.
            form: converts the answer to what is sent; usually called while the prediction is being stored.

        Raises:
            ProblemError: the request is refused or failed.
        """
        engine, started = self._engine, time.perf_counter()
        served = engine.adapter(request.adapter)
        engine.check_request(request.method, request.seed)
        checked = read_request(request, served.config, engine.settings, engine.max_input_tokens)
        engine.check_ready()
        seconds = min(engine.settings.request_timeout, timeout or engine.settings.request_timeout)
        self._note(served, checked)
        rows = self._admission.expected_rows(checked.demand)
        places = self._admission.enter(checked.estimated_tokens(rows, engine.max_input_tokens), seconds, checked.priority)
        self.in_flight += 1
        try:
            async with asyncio.timeout(seconds):
                computed = await self._compute(served, checked, places, started + seconds)
            formed: list[Answer] = []

            def form_answer(predictions: Sequence[Prediction]) -> None:
                formed.append(form(self._response(served.name, [cut(p, checked.top_k) for p in predictions], computed)))

            texts = [request.inputs] if isinstance(request.inputs, str) else request.inputs
            stored = await self._outcomes.record(
                served.name,
                engine.model_name,
                texts,
                computed.predictions,
                max(0.0, started + seconds - time.perf_counter()),
                partial(form_answer, computed.predictions),
            )
            if stored is not computed.predictions or not formed:
                form_answer(stored)
        except TimeoutError:
            raise ProblemError(
                "deadline-exceeded",
                f"no answer within the deadline of {seconds:g} s; send fewer inputs or samples, or try again later",
            ) from None
        except ProblemError as problem:
            if problem.__cause__ is not None:
                logger.error("a forward pass failed because of an input of this request", exc_info=problem.__cause__)
            raise
        finally:
            self.in_flight -= 1
            for place in places:
                place.free()
        asyncio.get_running_loop().call_soon(  # after the answer has been sent
            self._observe, served.name, computed.outcomes, time.perf_counter() - started
        )
        return formed[-1]

    def _note(self, served: Served, checked: CheckedRequest) -> None:
        """Write the adapter and the size of the request to its trace."""
        request_trace = trace.current()
        request_trace.adapter, request_trace.inputs = served.name, len(checked.texts)
        request_trace.characters = sum(map(len, checked.texts))
        request_trace.compute_type = self._engine.device.partition(":")[0]

    async def _compute(self, served: Served, checked: CheckedRequest, places: Sequence[Place], until: float) -> _Computed:
        """Tokenise, run the passes and compute the answers.

        Args:
            until: the request's deadline, on the clock of `time.perf_counter`.
        """
        request_trace, started = trace.current(), time.perf_counter()
        sequences, jobs = await self._prepare(served, checked)
        self._metrics.stage("tokenise", time.perf_counter() - started)
        request_trace.tokens = sum(map(len, sequences))
        request_trace.stages.tokenized_in(started)
        pending = self._batcher.submit(served, sequences, jobs, places, request_trace.stages, until)
        try:
            results = [await pending[0]] if len(pending) == 1 else await asyncio.gather(*pending)
        finally:
            for future in pending:
                future.cancel()
        if is_small(jobs, results):
            outcomes, predictions = answers_of(jobs, results, checked, served.config)
        else:
            outcomes, predictions = await asyncio.get_running_loop().run_in_executor(
                self._answer_threads, answers_of, jobs, results, checked, served.config
            )
        rows = sum(job.rows_taken(result) for job, result in zip(jobs, results, strict=True))
        return _Computed(outcomes, predictions, warnings_of(served, checked), rows)

    async def _prepare(self, served: Served, checked: CheckedRequest) -> tuple[list[list[int]], list[Job]]:
        """The token ids and the job of each input.

        A short request is prepared at once on this thread. A longer one is prepared on the prompt thread in slices, so that
        requests take turns, and a cancelled request stops at the next slice.
        """
        loop, max_tokens = asyncio.get_running_loop(), self._engine.max_input_tokens
        *earlier, last = slices(checked)
        if is_short(checked, self._engine.settings):
            prepared = self._prompt_thread.call(_prepare_last, served, checked, last, max_tokens)
            if prepared is not None:
                return prepared
        sequences: list[list[int]] = []
        for positions in earlier:
            sequences += await loop.run_in_executor(
                self._prompt_thread, encode, served.prompter, checked, positions, max_tokens
            )
        ids, jobs = await loop.run_in_executor(self._prompt_thread, _prepare_last, served, checked, last, max_tokens)
        return sequences + ids, jobs

    def _response(self, adapter: str, predictions: Sequence[Prediction], computed: _Computed) -> PredictResponse:
        # The JSON has the field only if there are warnings.
        optional: dict[str, Any] = {"warnings": computed.warnings} if computed.warnings else {}
        request_trace = trace.current()
        return PredictResponse(
            id=request_trace.request_id,
            model=self._engine.model_name,
            adapter=adapter,
            predictions=list(predictions),
            **optional,
            usage=Usage(tokens=request_trace.tokens, rows=computed.rows),
        )

    def _observe(self, adapter: str, outcomes: Sequence[Predictive], seconds: float) -> None:
        self._metrics.stage("total", seconds)
        for outcome in outcomes:
            self._metrics.observe_prediction(adapter, outcome)


def _prepare_last(
    served: Served, checked: CheckedRequest, positions: range, max_tokens: int
) -> tuple[list[list[int]], list[Job]]:
    """The token ids of the last slice of inputs, and the jobs of all inputs."""
    return encode(served.prompter, checked, positions, max_tokens), jobs_for(served, checked)
