"""The life of one server and the path of one request: texts -> token ids -> queue -> logits -> predictive -> answer."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from torch import Tensor

from scalabl.errors import ScalaBLError
from scalabl.predictive import predictive
from server import trace
from server.answers import prediction_of
from server.batcher import Batcher
from server.decisions import decisions, level_for
from server.description import describe
from server.engine import Engine, Served
from server.metrics import Metrics
from server.outcomes.store import OutcomeStore
from server.problems import ProblemError
from server.prompts import choices_per_input, encode
from server.schemas import Info, PredictRequest, PredictResponse, Usage
from server.settings import ServeSettings

logger = logging.getLogger("scalabl")

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
        self._model_thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        # Tokenizers are not safe to share between threads, so theirs is one too.
        self._prompt_thread = ThreadPoolExecutor(1, thread_name_prefix="prompt")
        self._engine: Engine | None = None
        self._batcher: Batcher[Served] | None = None
        self._loading: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin loading; the health routes answer meanwhile."""
        self._loading = asyncio.create_task(self._start(), name="load")

    async def _start(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            await self.outcomes.start()
            engine = await loop.run_in_executor(self._model_thread, self._load, self.settings)
        except Exception as error:
            self.state = "failed"
            if not isinstance(error, ScalaBLError):
                logger.exception("loading failed")
            if self._on_failure is not None:
                self._on_failure(error)
            return
        for name in engine.adapters:
            self.outcomes.show(name)
        self._engine = engine
        self._batcher = Batcher(
            engine.run,
            self._model_thread,
            self.metrics,
            target_tokens=engine.target_batch_tokens,
            max_tokens=self.settings.max_batch_tokens,
            max_queue=self.settings.max_queue,
        )
        self._batcher.start()
        if self.state == "starting":
            self.state = "ready"
            self.metrics.ready.set(1)

    def drain(self) -> None:
        """Take no new requests; those already taken are answered."""
        if self.state != "failed":
            self.state = "draining"
        self.metrics.ready.set(0)

    async def stop(self) -> None:
        """End the batcher and the threads."""
        self.drain()
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.gather(self._loading, return_exceptions=True)
        if self._batcher is not None:
            await self._batcher.stop()
        await self.outcomes.stop()
        self._model_thread.shutdown(wait=False, cancel_futures=True)
        self._prompt_thread.shutdown(wait=False, cancel_futures=True)

    def _serving(self) -> tuple[Engine, Batcher[Served]]:
        if self.state != "ready" or self._engine is None or self._batcher is None:
            raise ProblemError(self.state, UNAVAILABLE[self.state], retry_after=5)
        return self._engine, self._batcher

    def adapter(self, name: str) -> Served:
        """A loaded adapter.

        Raises:
            ProblemError: there is none of this name, or the server does not take requests.
        """
        return self._serving()[0].adapter(name)

    async def predict(self, request: PredictRequest) -> PredictResponse:
        """Answer one request.

        Raises:
            ProblemError: everything that the client can be told.
        """
        engine, batcher = self._serving()
        settings = self.settings
        served = engine.adapter(request.adapter)
        num_samples = request.num_samples or settings.num_samples
        if num_samples > settings.max_samples:
            raise ProblemError(
                "invalid-field", f"num_samples: {num_samples} is above this server's limit of {settings.max_samples}"
            )
        texts = [request.inputs] if isinstance(request.inputs, str) else request.inputs
        if len(texts) > settings.max_inputs:
            raise ProblemError(
                "input-too-large",
                f"inputs: {len(texts)} texts are above the limit of {settings.max_inputs} per request",
            )
        seed = settings.seed if request.seed is None else request.seed
        choices = choices_per_input(served.prompter.task, request, len(texts))
        calibration = served.model.config.calibration
        level = level_for(calibration, request.coverage)
        seen = trace.current()
        seen.adapter, seen.inputs, seen.characters = served.name, len(texts), sum(map(len, texts))
        seen.compute_type = served.model.device.type
        loop = asyncio.get_running_loop()
        pending: list[asyncio.Future[Tensor]] = []
        try:
            async with asyncio.timeout(settings.request_timeout):
                started = time.perf_counter()
                sequences = await loop.run_in_executor(
                    self._prompt_thread, encode, served.prompter, texts, choices, engine.max_input_tokens, request.truncate
                )
                seen.tokens = sum(map(len, sequences))
                seen.stages.tokenized_in(started)
                draws = served.draws(num_samples, seed)
                pending = batcher.submit(served, sequences, draws, seen.stages)
                logits = await asyncio.gather(*pending)
        except TimeoutError:
            raise ProblemError(
                "deadline-exceeded",
                f"no answer within {settings.request_timeout:g} s; send fewer inputs or samples, or try again later",
            ) from None
        finally:
            for future in pending:
                future.cancel()
        outcomes = [
            predictive(z[:, : len(names)], served.model.config.temperature, draws.scheme)
            for z, names in zip(logits, choices, strict=True)
        ]
        for outcome in outcomes:
            self.metrics.observe_prediction(served.name, outcome)
        predictions = [
            prediction_of(outcome, names, draws, request.return_samples, decisions(outcome, names, calibration, level))
            for outcome, names in zip(outcomes, choices, strict=True)
        ]
        predictions = await self.outcomes.record(served.name, engine.model_name, texts, predictions)
        return PredictResponse(
            id=f"req-{uuid.uuid4().hex}",
            model=engine.model_name,
            adapter=served.name,
            predictions=predictions,
            usage=Usage(tokens=seen.tokens, rows=len(sequences) * num_samples),
        )

    def info(self) -> Info:
        """What is loaded.

        Raises:
            ProblemError: not ready yet.
        """
        engine, _ = self._serving()
        return describe(engine)
