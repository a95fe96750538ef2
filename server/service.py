"""The life of one server and the path of one request: texts -> token ids -> queue -> logits -> predictive -> answer."""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from torch import Tensor

from scalabl import __version__
from scalabl.errors import InputTooLongError, PromptError, ScalaBLError
from scalabl.posterior import Draws
from scalabl.predictive import Predictive, predictive
from server.batcher import Batcher
from server.engine import Engine
from server.metrics import Metrics
from server.outcomes.store import OutcomeStore
from server.problems import ProblemError
from server.schemas import (
    AdapterInfo,
    Info,
    ModelInfo,
    Prediction,
    PredictRequest,
    PredictResponse,
    StandardError,
    Usage,
)
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
        self._batcher: Batcher | None = None
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
        self.outcomes.show(engine.adapter_name)
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

    def _serving(self) -> tuple[Engine, Batcher]:
        if self.state != "ready" or self._engine is None or self._batcher is None:
            raise ProblemError(self.state, UNAVAILABLE[self.state], retry_after=5)
        return self._engine, self._batcher

    async def predict(self, request: PredictRequest) -> PredictResponse:
        """Answer one request.

        Raises:
            ProblemError: everything that the client can be told.
        """
        engine, batcher = self._serving()
        settings = self.settings
        if request.adapter is not None and request.adapter != engine.adapter_name:
            raise ProblemError(
                "unknown-adapter",
                f"adapter: {request.adapter!r} is not loaded; this server has {engine.adapter_name!r}",
            )
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
        choices = _choices_per_input(engine, request, len(texts))
        loop = asyncio.get_running_loop()
        pending: list[asyncio.Future[Tensor]] = []
        try:
            async with asyncio.timeout(settings.request_timeout):
                sequences = await loop.run_in_executor(
                    self._prompt_thread, _encode, engine, texts, choices, request.truncate
                )
                draws = engine.draws(num_samples, seed)
                pending = batcher.submit(sequences, draws)
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
            predictive(z[:, : len(names)], engine.model.config.temperature, draws.scheme)
            for z, names in zip(logits, choices, strict=True)
        ]
        for outcome in outcomes:
            self.metrics.observe_prediction(engine.adapter_name, outcome)
        predictions = [
            _prediction(outcome, names, draws, request.return_samples)
            for outcome, names in zip(outcomes, choices, strict=True)
        ]
        predictions = await self.outcomes.record(engine.adapter_name, engine.model_name, texts, predictions)
        return PredictResponse(
            id=f"req-{uuid.uuid4().hex}",
            model=engine.model_name,
            adapter=engine.adapter_name,
            predictions=predictions,
            usage=Usage(tokens=sum(map(len, sequences)), rows=len(sequences) * num_samples),
        )

    def info(self) -> Info:
        """What is loaded.

        Raises:
            ProblemError: not ready yet.
        """
        engine, _ = self._serving()
        settings, model = self.settings, engine.model
        config = model.config
        return Info(
            version=__version__,
            model=ModelInfo(
                name=engine.model_name,
                architecture=type(model.base).__name__,
                dtype=str(model.base.dtype).removeprefix("torch."),
                device=str(model.device),
            ),
            adapter=AdapterInfo(
                name=engine.adapter_name,
                r=config.r,
                lora_alpha=config.lora_alpha,
                adapted_layers=len(model.adapted),
                stochastic_parameters=model.num_stochastic_parameters,
                additional_parameters=sum(p.numel() for p in model.adapter_parameters().values()),
                posterior_scale=config.posterior_scale,
                temperature=config.temperature,
                task=config.task.kind,
                choices=list(config.task.choices),
            ),
            defaults={"num_samples": settings.num_samples, "seed": settings.seed, "draw_scheme": settings.draw_scheme},
            limits={
                "max_samples": settings.max_samples,
                "max_inputs": settings.max_inputs,
                "max_input_tokens": engine.max_input_tokens,
                "max_batch_tokens": settings.max_batch_tokens,
                "max_body_bytes": settings.max_body_bytes,
                "max_queue": settings.max_queue,
                "request_timeout": settings.request_timeout,
            },
        )


def _choices_per_input(engine: Engine, request: PredictRequest, count: int) -> list[Sequence[str]]:
    """The names of each input's choices, after checking that the request's `choices` fit the task and the inputs."""
    task = engine.prompter.task
    if task.kind == "classification":
        if request.choices is not None:
            raise ProblemError(
                "invalid-field",
                "choices: this adapter's task is classification with fixed choices; leave the field out",
            )
        return [task.choices] * count
    if request.choices is None:
        raise ProblemError("invalid-field", "choices: this adapter's task is multiple_choice; send the choices to rank")
    per_input: list[Sequence[str]] = [each for each in request.choices if not isinstance(each, str)]
    if not per_input:
        return [[each for each in request.choices if isinstance(each, str)]] * count
    if len(per_input) != count:
        raise ProblemError("invalid-field", f"choices: {len(per_input)} lists were given for {count} inputs")
    return per_input


def _encode(engine: Engine, texts: Sequence[str], choices: Sequence[Sequence[str]], truncate: bool) -> list[list[int]]:
    multiple_choice = engine.prompter.task.kind == "multiple_choice"
    sequences = []
    for position, (text, names) in enumerate(zip(texts, choices, strict=True)):
        where = f".{position}" if len(texts) > 1 else ""
        try:
            sequences.append(
                engine.prompter.encode(
                    text, names if multiple_choice else None, max_tokens=engine.max_input_tokens, truncate=truncate
                )
            )
        except InputTooLongError as error:
            raise ProblemError("input-too-large", f"inputs{where}: {error.message}") from None
        except PromptError as error:
            raise ProblemError("invalid-field", f"{error.field or 'inputs'}{where}: {error.message}") from None
    return sequences


def _prediction(outcome: Predictive, choices: Sequence[str], draws: Draws, return_samples: bool) -> Prediction:
    probabilities = outcome.probabilities.tolist()
    index = max(range(len(probabilities)), key=probabilities.__getitem__)
    error = outcome.standard_error
    optional: dict[str, Any] = {}  # left out of the JSON unless asked for
    if return_samples:
        optional["samples"] = [dict(zip(choices, each, strict=True)) for each in outcome.sample_probabilities.tolist()]
    return Prediction(
        id=f"pred-{uuid.uuid4().hex}",
        recorded=True,
        prediction=choices[index],
        index=index,
        confidence=probabilities[index],
        probabilities=dict(zip(choices, probabilities, strict=True)),
        entropy=float(outcome.entropy),
        expected_entropy=float(outcome.expected_entropy),
        mutual_information=float(outcome.mutual_information),
        standard_error=StandardError(
            probabilities=dict(zip(choices, map(_known, error.probabilities.tolist()), strict=True)),
            entropy=_known(float(error.entropy)),
            expected_entropy=_known(float(error.expected_entropy)),
            mutual_information=_known(float(error.mutual_information)),
        ),
        num_samples=draws.num_samples,
        method="monte_carlo",
        abstain=None,
        **optional,
    )


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
