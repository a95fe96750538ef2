"""The life of one server and the path of one request: texts -> token ids -> queue -> logits -> predictive -> answer."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Literal, TypeVar

from scalabl.errors import ScalaBLError
from scalabl.uncertainty.predictive import Predictive
from scalabl_server.batching.admission import Admission, Place
from scalabl_server.batching.batcher import Batcher
from scalabl_server.batching.jobs import Job, jobs_for, warnings_of
from scalabl_server.batching.threads import OneAtATime, leave_cores, rest
from scalabl_server.engines.adapter_loader import AdapterLoader
from scalabl_server.engines.interface import Engine, Served
from scalabl_server.observe import trace
from scalabl_server.observe.metrics import Metrics
from scalabl_server.outcomes.store import OutcomeStore
from scalabl_server.predict.answers import answers_of, is_small
from scalabl_server.predict.request import Asked, encode, read_request
from scalabl_server.problems import ProblemError
from scalabl_server.schemas import Info, Prediction, PredictRequest, PredictResponse, Usage
from scalabl_server.settings import ServeSettings
from scalabl_server.web.description import describe

logger = logging.getLogger("scalabl")

Answer = TypeVar("Answer")
State = Literal["starting", "ready", "draining", "failed"]

UNAVAILABLE = {
    "starting": "the model is being loaded; wait for /health/ready",
    "draining": "the server is shutting down; try another replica",
    "failed": "the model could not be loaded; the server's log says why",
}


class Service:
    """Owns the engine, its one worker thread, the batcher and the state that the health routes report.

    Args:
        settings: see `ServeSettings`.
        load: makes the engine; called once, on the worker thread.
        on_failure: told the error when loading fails, so that the process can end with it.
    """

    def __init__(
        self,
        settings: ServeSettings,
        load: Callable[[ServeSettings], Engine],
        on_failure: Callable[[Exception], None] | None = None,
    ) -> None:
        self.settings, self._load, self._on_failure = settings, load, on_failure
        self.metrics = Metrics()
        self.outcomes = OutcomeStore(settings, self.metrics)
        self.state: State = "starting"
        self.metrics.ready.set_function(lambda: float(self._is_ready()))
        self._model_thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        # Tokenizers are not safe to share between threads, so theirs is one too.
        self._prompt_thread = OneAtATime("prompt")
        self._answer_threads = ThreadPoolExecutor(2, thread_name_prefix="answer", initializer=leave_cores)
        self.admission = Admission(settings.max_queue, settings.queue_tokens, self.metrics)
        self._is_loading = False
        self.in_flight = 0  # requests between admission and answer
        self._engine: Engine | None = None
        self._batcher: Batcher[Served] | None = None
        self._loader: AdapterLoader | None = None
        self._loading: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin loading; the health routes answer meanwhile."""
        leave_cores()  # small answers are computed on the loop
        self._loading = asyncio.create_task(self._start(), name="load")

    async def _start(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            await self.outcomes.start()
            engine = await loop.run_in_executor(self._model_thread, self._load_model)
        except Exception as error:
            self.state = "failed"
            if not isinstance(error, ScalaBLError):
                logger.exception("loading failed")
            if self._on_failure is not None:
                self._on_failure(error)
            return
        for name in engine.adapters:
            self.outcomes.show(name)
        engine.watch(self.metrics)
        self._engine = engine
        self.metrics.prefixes.store = engine.prefixes
        self._batcher = Batcher(
            engine.run,
            self._model_thread,
            self.admission,
            self.metrics,
            target_tokens=engine.target_batch_tokens,
            max_tokens=self.settings.max_batch_tokens,
            pads=lambda served: served.pads,
            rest=rest,
        )
        self._loader = AdapterLoader(
            engine, self.settings, self.metrics, self._prompt_thread, self._model_thread, self.outcomes.show
        )
        self.metrics.adapters.set(len(engine.adapters))
        self._batcher.start()
        if self.state == "starting":
            self.state = "ready"

    def _load_model(self) -> Engine:
        self._is_loading = True
        try:
            return self._load(self.settings)
        finally:
            self._is_loading = False

    def check_alive(self) -> None:
        """Whether a restart would not help.

        Raises:
            ProblemError: `failed` or `stuck`.
        """
        if self.state == "failed":
            raise ProblemError("failed", UNAVAILABLE["failed"])
        fault = self._batcher.fault(self.settings.worker_timeout) if self._batcher is not None else None
        if fault is not None:
            raise ProblemError("stuck", fault)

    def check_ready(self) -> None:
        """Whether requests should come here.

        Raises:
            ProblemError: `starting`, `draining`, `failed`, `stuck` or `engine-unavailable`.
        """
        if self.state != "ready":
            raise ProblemError(self.state, UNAVAILABLE[self.state], retry_after=5)
        self.check_alive()
        if self._engine is not None:
            self._engine.check_ready()

    def _is_ready(self) -> bool:
        try:
            self.check_ready()
        except ProblemError:
            return False
        return True

    def drain(self) -> None:
        """Take no new requests; those already taken are answered. A signal handler may call it: it takes no lock."""
        if self.state != "failed":
            self.state = "draining"

    @property
    def busy(self) -> bool:
        """Whether the model's thread is loading or in a pass, waited for or not."""
        return self._is_loading or (self._batcher is not None and self._batcher.busy)

    async def give_up(self) -> None:
        """Answer everything that is still waiting with a 503."""
        if self._batcher is not None:
            await self._batcher.stop()

    async def stop(self) -> None:
        """End the batcher and the threads."""
        self.drain()
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.gather(self._loading, return_exceptions=True)
        if self._batcher is not None:
            await self._batcher.stop()
        if self._engine is not None:
            self._engine.close()
        await self.outcomes.stop()
        for executor in (self._model_thread, self._prompt_thread, self._answer_threads):
            executor.shutdown(wait=False, cancel_futures=True)

    def _serving(self) -> tuple[Engine, Batcher[Served]]:
        if self.state != "ready" or self._engine is None or self._batcher is None:
            raise ProblemError(self.state, UNAVAILABLE[self.state], retry_after=5)
        return self._engine, self._batcher

    def adapter(self, name: str | None) -> Served:
        """A loaded adapter; None is the default one.

        Raises:
            ProblemError: there is none of this name, or the server does not take requests.
        """
        return self._serving()[0].adapter(name)

    async def predict(
        self, request: PredictRequest, timeout: float | None, form: Callable[[PredictResponse], Answer]
    ) -> Answer:
        """Answer one request.

        Args:
            timeout: seconds until its deadline; the setting is the most.
            form: makes of the answer what is sent, as a rule while the disk is waited for.

        Raises:
            ProblemError: everything that the client can be told.
        """
        engine, batcher = self._serving()
        started = time.perf_counter()
        served = engine.adapter(request.adapter)
        engine.check_request(request)
        asked = read_request(request, served.config, engine.settings, engine.max_input_tokens)
        engine.check_ready()
        seconds = min(self.settings.request_timeout, timeout or self.settings.request_timeout)
        seen = trace.current()
        seen.adapter, seen.inputs, seen.characters = served.name, len(asked.texts), sum(map(len, asked.texts))
        seen.compute_type = engine.device.partition(":")[0]
        rows = asked.rows if asked.rule is None else self.admission.expected_rows(asked.rule)
        estimated = asked.estimated_tokens(rows, engine.max_input_tokens)
        places = self.admission.enter(estimated, seconds, asked.priority)
        self.in_flight += 1
        try:
            async with asyncio.timeout(seconds):
                outcomes, predictions = await self._compute(engine, batcher, served, asked, places, started + seconds)
            formed: list[Answer] = []

            def answer_with(predictions: Sequence[Prediction]) -> None:
                formed.append(form(_response(engine, served, asked, predictions)))

            texts = [request.inputs] if isinstance(request.inputs, str) else request.inputs
            left = max(0.0, started + seconds - time.perf_counter())
            kept = await self.outcomes.record(
                served.name, engine.model_name, texts, predictions, left, partial(answer_with, predictions)
            )
            if kept is not predictions or not formed:
                answer_with(kept)
        except TimeoutError:
            raise ProblemError(
                "deadline-exceeded",
                f"no answer within {seconds:g} s; send fewer inputs or samples, or try again later",
            ) from None
        except ProblemError as problem:
            if problem.__cause__ is not None:
                logger.error("a pass failed on this request alone", exc_info=problem.__cause__)
            raise
        finally:
            self.in_flight -= 1
            for place in places:
                place.free()
        asyncio.get_running_loop().call_soon(  # once the answer is sent
            self._observe, served.name, outcomes, time.perf_counter() - started
        )
        return formed[-1]

    def _observe(self, adapter: str, outcomes: Sequence[Predictive], seconds: float) -> None:
        self.metrics.stage("total", seconds)
        for outcome in outcomes:
            self.metrics.observe_prediction(adapter, outcome)

    async def _compute(
        self, engine: Engine, batcher: Batcher[Served], served: Served, asked: Asked, places: Sequence[Place], until: float
    ) -> tuple[list[Predictive], list[Prediction]]:
        """What the samples come to, and its JSON, of each input.

        Args:
            until: its deadline, by `time.perf_counter`.
        """
        seen, started = trace.current(), time.perf_counter()
        sequences, jobs = await self._tokenise(served, asked, engine.max_input_tokens)
        self.metrics.stage("tokenise", time.perf_counter() - started)
        seen.tokens = sum(map(len, sequences))
        seen.stages.tokenized_in(started)
        pending = batcher.submit(served, sequences, jobs, places, seen.stages, until)
        try:
            results = [await pending[0]] if len(pending) == 1 else await asyncio.gather(*pending)
        finally:
            for future in pending:
                future.cancel()
        if is_small(results):
            return answers_of(results, asked, served.config, jobs)
        return await asyncio.get_running_loop().run_in_executor(
            self._answer_threads, answers_of, results, asked, served.config, jobs
        )

    async def _tokenise(self, served: Served, asked: Asked, max_tokens: int) -> tuple[list[list[int]], list[Job]]:
        """A slice at a time, so that requests take turns and one that is given up goes no further; a short one at once."""
        loop = asyncio.get_running_loop()
        *slices, last = asked.slices()
        if asked.is_short(self.settings):
            done = self._prompt_thread.call(_prepare, served, asked, last, max_tokens)
            if done is not None:
                return done
        sequences: list[list[int]] = []
        for positions in slices:
            sequences += await loop.run_in_executor(
                self._prompt_thread, encode, served.prompter, asked, positions, max_tokens
            )
        ids, jobs = await loop.run_in_executor(self._prompt_thread, _prepare, served, asked, last, max_tokens)
        return sequences + ids, jobs

    def loader(self) -> AdapterLoader:
        """What changes the adapters.

        Raises:
            ProblemError: not ready yet, or draining.
        """
        self._serving()
        assert self._loader is not None  # made with the engine
        return self._loader

    def adapter_names(self) -> list[str]:
        """The adapters that answer."""
        return sorted(self._serving()[0].adapters)

    def info(self) -> Info:
        """What is loaded.

        Raises:
            ProblemError: not ready yet.
        """
        engine, _ = self._serving()
        return describe(engine)


def _response(engine: Engine, served: Served, asked: Asked, predictions: Sequence[Prediction]) -> PredictResponse:
    warnings = warnings_of(served, asked) + ([asked.uncalibrated] if asked.uncalibrated is not None else [])
    optional: dict[str, Any] = {"warnings": warnings} if warnings else {}  # else left out of the JSON
    rows = len(predictions) * asked.rows if asked.rule is None else sum(each.num_samples for each in predictions)
    seen = trace.current()
    return PredictResponse(
        id=seen.request_id,
        model=engine.model_name,
        adapter=served.name,
        predictions=list(predictions),
        **optional,
        usage=Usage(tokens=seen.tokens, rows=rows),
    )


def _prepare(served: Served, asked: Asked, positions: range, max_tokens: int) -> tuple[list[list[int]], list[Job]]:
    """The last inputs' prompts, and every input's job, whose draws may have to be made."""
    return encode(served.prompter, asked, positions, max_tokens), jobs_for(served, asked)
