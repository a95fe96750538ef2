"""The lifetime of one server: start, load, ready, drain, stop. How a request is answered is in `predict`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from scalabl.errors import ScalaBLError
from scalabl_server.batching.admission import Admission
from scalabl_server.batching.batcher import Batcher
from scalabl_server.batching.threads import OneAtATime, leave_cores, rest
from scalabl_server.engines.adapter_loader import AdapterLoader
from scalabl_server.engines.interface import Engine, Served
from scalabl_server.observe.metrics import Metrics
from scalabl_server.outcomes.store import OutcomeStore
from scalabl_server.predict.predictor import Predictor
from scalabl_server.problems import ProblemError
from scalabl_server.settings import ServeSettings

logger = logging.getLogger("scalabl")

State = Literal["starting", "ready", "draining", "failed"]

UNAVAILABLE = {
    "starting": "the model is being loaded; wait until /health/ready returns 200",
    "draining": "the server is shutting down; try another replica",
    "failed": "the model could not be loaded; see the server's log for the reason",
}


@dataclass(frozen=True)
class Loaded:
    """The engine and the parts that use it; they exist once the engine is loaded."""

    engine: Engine
    batcher: Batcher[Served]
    predictor: Predictor
    loader: AdapterLoader


class ServerLifetime:
    """Owns the threads, the engine with the parts that use it, and the state that the health routes report.

    Args:
        settings: see `ServeSettings`.
        load: creates the engine; called once, on the model thread.
        on_failure: called with the error when loading fails, so that the process can exit with it.
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
        self.admission = Admission(settings.max_queue, settings.queue_tokens, self.metrics)
        self.state: State = "starting"
        self.metrics.ready.set_function(lambda: float(self._is_ready()))
        self._model_thread = ThreadPoolExecutor(1, thread_name_prefix="model")
        # Tokenizers are not thread-safe, so only one thread uses them.
        self._prompt_thread = OneAtATime("prompt")
        self._answer_threads = ThreadPoolExecutor(2, thread_name_prefix="answer", initializer=leave_cores)
        self._is_loading = False
        self._loading: asyncio.Task[None] | None = None
        self._loaded: Loaded | None = None

    async def start(self) -> None:
        """Begin to load the engine in the background; the health routes answer meanwhile."""
        leave_cores()  # small answers are computed on the event loop
        self._loading = asyncio.create_task(self._start(), name="load")

    async def _start(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            await self.outcomes.start()
            engine = await loop.run_in_executor(self._model_thread, self._load_engine)
        except Exception as error:
            self.state = "failed"
            if not isinstance(error, ScalaBLError):
                logger.exception("the model could not be loaded")
            if self._on_failure is not None:
                self._on_failure(error)
            return
        self._loaded = self._connect(engine)
        self._loaded.batcher.start()
        if self.state == "starting":
            self.state = "ready"

    def _load_engine(self) -> Engine:
        self._is_loading = True
        try:
            return self._load(self.settings)
        finally:
            self._is_loading = False

    def _connect(self, engine: Engine) -> Loaded:
        """Create the parts that use the engine, and connect them with the metrics."""
        for served in engine.adapters.values():
            self._show(served)
        self.metrics.adapters.set(len(engine.adapters))
        self.metrics.prefixes.store = engine.prefixes
        engine.watch(self.metrics)
        batcher: Batcher[Served] = Batcher(
            engine.run,
            self._model_thread,
            self.admission,
            self.metrics,
            target_tokens=engine.target_batch_tokens,
            max_tokens=self.settings.max_batch_tokens,
            pads=lambda served: served.pads,
            shape=lambda served: served.shape,
            rest=rest,
        )
        predictor = Predictor(
            engine, batcher, self.admission, self.outcomes, self.metrics, self._prompt_thread, self._answer_threads
        )
        loader = AdapterLoader(engine, self.settings, self.metrics, self._prompt_thread, self._model_thread, self._show)
        return Loaded(engine, batcher, predictor, loader)

    def _show(self, served: Served) -> None:
        """Create an adapter's counters at 0, before its first prediction."""
        self.outcomes.show(served.name)
        level = served.config.novelty_level
        if served.drift is not None and level is not None:
            self.metrics.novelty.show(served.name, level)

    def serving(self) -> Loaded:
        """The engine and the parts that answer requests.

        Raises:
            ProblemError: `starting`, `draining` or `failed`, when requests cannot be answered.
        """
        if self.state != "ready":
            raise ProblemError(self.state, UNAVAILABLE[self.state], retry_after=5)
        assert self._loaded is not None  # set before the state becomes ready
        return self._loaded

    def check_alive(self) -> None:
        """Check for liveness: return unless only a restart can help.

        Raises:
            ProblemError: `failed` or `stuck`.
        """
        if self.state == "failed":
            raise ProblemError("failed", UNAVAILABLE["failed"])
        fault = self._loaded.batcher.fault(self.settings.worker_timeout) if self._loaded is not None else None
        if fault is not None:
            raise ProblemError("stuck", fault)

    def check_ready(self) -> None:
        """Check for readiness: return if the server can answer requests now.

        Raises:
            ProblemError: `starting`, `draining`, `failed`, `stuck` or `engine-unavailable`.
        """
        loaded = self.serving()
        self.check_alive()
        loaded.engine.check_ready()

    def _is_ready(self) -> bool:
        try:
            self.check_ready()
        except ProblemError:
            return False
        return True

    def drain(self) -> None:
        """Refuse new requests; accepted ones are still answered. Takes no lock, so a signal handler may call it."""
        if self.state != "failed":
            self.state = "draining"

    @property
    def in_flight(self) -> int:
        """The number of requests between admission and answer."""
        return self._loaded.predictor.in_flight if self._loaded is not None else 0

    @property
    def busy(self) -> bool:
        """Whether the model thread is loading or runs a pass, even one whose result nobody needs any more."""
        return self._is_loading or (self._loaded is not None and self._loaded.batcher.busy)

    async def give_up(self) -> None:
        """Answer all requests that still wait with a 503."""
        if self._loaded is not None:
            await self._loaded.batcher.stop()

    async def stop(self) -> None:
        """Stop the batcher, the engine, the outcome store and the threads."""
        self.drain()
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.gather(self._loading, return_exceptions=True)
        if self._loaded is not None:
            await self._loaded.batcher.stop()
            self._loaded.engine.close()
        await self.outcomes.stop()
        for executor in (self._model_thread, self._prompt_thread, self._answer_threads):
            executor.shutdown(wait=False, cancel_futures=True)
