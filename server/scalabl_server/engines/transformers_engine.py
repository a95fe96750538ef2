"""The default engine: transformers in this process. The only module of the server that uses a `ScalaBLModel`."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from scalabl.base.pretrained import Pretrained, load_pretrained
from scalabl.errors import AdapterError, ScalaBLError
from scalabl.evaluation.precision_change import Probes, QuantizationChange, load_and_ask
from scalabl.files.adapter_directory import check_effect, read_adapter, read_config
from scalabl.model.posterior import Draws
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.model.token_batch import TokenBatch
from scalabl.passes.prefix_cache import PrefixCache, PrefixStore
from scalabl.passes.probes import find_shared_work
from scalabl.passes.side_by_side import Combinations, SharedRounds, agree_side_by_side, pass_shape
from scalabl.prompt import Prompter
from scalabl.uncertainty.linearized import NEGLIGIBLE, SPREAD_LIMIT, Linearization, linearize
from scalabl.uncertainty.predictive import Predictive
from scalabl_server.batching.faults import classify
from scalabl_server.batching.jobs import Job, Result, SampledJob
from scalabl_server.batching.threads import take_cores
from scalabl_server.engines.budget import LENGTH, UNMEASURED_CPU_TOKENS, find_budget
from scalabl_server.engines.interface import Engine, Served
from scalabl_server.engines.rounds import sample_in_rounds
from scalabl_server.settings import ServeSettings

logger = logging.getLogger("scalabl")


class CapacityError(ScalaBLError):
    """A pass that the settings allow does not fit in this machine's memory."""


@dataclass(eq=False)
class LocalAdapter(Served):
    """An adapter on the base model in this process.

    Attributes:
        opening: the tokens that its prompt template puts before every input.
        prefixes: the prefix cache of its prompts; None if it is disabled, and until the adapter is checked.
    """

    model: ScalaBLModel
    opening: list[int]
    prefixes: PrefixCache | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class TransformersEngine(Engine):
    """The base model in this process, loaded once, with any number of adapters that share it."""

    pretrained: Pretrained
    combinations: Combinations = field(default_factory=Combinations)

    def run(self, served: Sequence[Served], sequences: Sequence[Sequence[int]], jobs: Sequence[Job]) -> list[Result]:
        """One forward pass for all sampled jobs, further rounds for those that need more, and the linearisations."""
        try:
            return self._run([_local(adapter) for adapter in served], sequences, jobs)
        finally:
            for adapter in dict.fromkeys(served):
                if self.adapters.get(adapter.name) is not adapter:  # unloaded or replaced while its requests waited
                    self.release(adapter)

    def _run(self, served: Sequence[LocalAdapter], sequences: Sequence[Sequence[int]], jobs: Sequence[Job]) -> list[Result]:
        caches = {adapter.model: adapter.prefixes for adapter in served}
        models = [adapter.model for adapter in served]
        try:
            return run_jobs(models, sequences, jobs, caches, self.combinations)
        except Exception as error:
            if not self.prefixes.bytes or classify(error).kind != "out-of-memory":
                raise
            logger.warning("a pass over %d inputs did not fit in memory; emptying the prefix cache", len(sequences))
        self.prefixes.clear()
        return run_jobs(models, sequences, jobs, {}, self.combinations)

    def read(self, name: str, folder: Path) -> Callable[[], Served]:
        model = read_adapter(self.pretrained.model, folder)
        return lambda: self._serve(name, model)

    def _serve(self, name: str, model: ScalaBLModel) -> Served:
        prompter = Prompter(model.config.task, self.pretrained.tokenizer)
        prompter.check_tokenizer(model.config.base_model_name_or_path)
        return LocalAdapter(
            name=name,
            config=model.config,
            prompter=prompter,
            scheme=self.settings.draw_scheme,
            adapted_layers=len(model.adapted),
            stochastic_parameters=model.members * model.num_stochastic_parameters,
            additional_parameters=sum(p.numel() for p in model.adapter_parameters().values()),
            relative_spread=model.posterior().relative_spread,
            model=model,
            opening=prompter.opening(),
        )

    def check(self, served: Served) -> None:
        """Run the first passes of an adapter: find which work its samples can share, check its effect, and warm up."""
        local = _local(served)
        model = local.model
        try:
            try:
                served.draws(self.settings.num_samples, self.settings.seed)
            except ValueError as error:
                raise AdapterError(str(error)) from None
            find_shared_work(model)
            served.pads = not model.packs
            check_effect(model)
            served.shape = self._shape_of(local)
            if self.prefixes.limit:
                local.prefixes = PrefixCache(self.prefixes, model, local.opening)
                if not local.prefixes.longest:
                    logger.info("adapter %s: the prefix cache cannot be used with this base model", served.name)
            model.warm_up()
            if served.relative_spread > SPREAD_LIMIT:
                logger.warning(
                    "adapter %s: the median sigma / |mu| is %.2g; answers of the method linearized will be biased",
                    served.name,
                    served.relative_spread,
                )
        except BaseException:
            model.detach()
            raise

    def _shape_of(self, local: LocalAdapter) -> Hashable:
        """The shape of a new adapter: that of a loaded one with which it can share passes, as a test pass shows."""
        shape = pass_shape(local.model)
        other = next((adapter for adapter in self.adapters.values() if adapter.shape == shape), None)
        if other is None:
            return shape
        if agree_side_by_side(_local(other).model, local.model):
            self.combinations.of((_local(other).model, local.model)).warm_up()
            return shape
        logger.info("adapter %s: its inputs cannot share passes with those of other adapters", local.name)
        return object()

    def release(self, served: Served) -> None:
        local = _local(served)
        local.model.detach()
        self.combinations.forget(local.model)
        if local.prefixes is not None:
            local.prefixes.clear()

    def budget(self) -> int:
        """The target for the tokens of a pass, from the settings or by measuring passes of the default adapter."""
        settings, device, most = self.settings, self.pretrained.device, self.settings.max_batch_tokens
        if settings.target_batch_tokens is not None:
            return min(settings.target_batch_tokens, most)
        if settings.warmup == "quick":
            return min(UNMEASURED_CPU_TOKENS, most) if device.type == "cpu" else most
        served, length = self.adapter(None), min(LENGTH, self.max_input_tokens)
        samples = max(1, min(settings.num_samples, most // length))
        job = _usual_job(served, samples, settings.seed)

        def run(tokens: int) -> None:
            self._run_alike(served, max(1, tokens // (samples * length)), length, job)

        with self._room_for_prefixes():
            return find_budget(run, device, samples * length, most)

    def _run_alike(self, served: Served, inputs: int, length: int, job: Job) -> None:
        """Run a pass over this many inputs of one length, each with this job, without the prefix cache."""
        run_jobs([_local(served).model] * inputs, [[0] * length] * inputs, [job] * inputs, {}, self.combinations)

    @contextmanager
    def _room_for_prefixes(self) -> Iterator[None]:
        """Reserve the GPU memory that the prefix cache may need later."""
        device = self.pretrained.device
        room = torch.empty(0 if device.type == "cpu" else self.prefixes.limit, dtype=torch.uint8, device=device)
        yield
        del room

    def compare(self, served: Served, before: Predictive) -> None:
        """Measure and log how much quantization has changed an adapter's answers.

        Args:
            before: its answers with the unquantized base model.
        """
        after = _asker(self.settings)(_local(served).model, self.pretrained)
        served.quantization_change = QuantizationChange.between(before, after)
        logger.info("adapter %s: %s: %s", served.name, self.settings.quantization, served.quantization_change)

    def warm_up(self) -> None:
        """Run passes of the default adapter; also of the largest shapes that requests may cause, if the settings say so.

        Raises:
            CapacityError: one of these passes does not fit in memory.
        """
        served, settings = self.adapter(None), self.settings
        shapes = [(1, settings.num_samples, min(16, self.max_input_tokens))]  # inputs, samples, length
        full = settings.warmup == "full" or (settings.warmup == "auto" and self.pretrained.device.type != "cpu")
        if full:
            longest = min(self.max_input_tokens, settings.max_batch_tokens)
            for tokens, length in ((self.target_batch_tokens, min(16, longest)), (settings.max_batch_tokens, longest)):
                rows = max(1, tokens // length)
                samples = min(settings.num_samples, rows)
                shapes.append((rows // samples, samples, length))
        for inputs, samples, length in shapes:
            job = _usual_job(served, samples, settings.seed)
            try:
                with self._room_for_prefixes():
                    self._run_alike(served, inputs, length, job)
            except Exception as error:
                if classify(error).kind != "out-of-memory":
                    raise
                raise CapacityError(
                    f"a pass over {inputs} inputs x {samples} samples x {length} tokens does not fit in memory, but "
                    f"--max-batch-tokens {settings.max_batch_tokens} allows it next to --prefix-cache-bytes "
                    f"{settings.prefix_cache_bytes}; lower one of them or --max-input-tokens"
                ) from None


def load(settings: ServeSettings) -> Engine:
    """Load, check and warm up the base model and the adapters.

    Raises:
        AdapterError, BaseModelError, PromptError: what is wrong, and in which file, module or field.
        CapacityError: a pass that requests may ask for does not fit in memory.
    """
    started = time.perf_counter()
    disable_progress_bar()  # it would only clutter the log
    take_cores(settings.threads)
    folders = settings.adapter_folders()
    configs = [read_config(folder) for folder in folders.values()]  # check the configurations before the slow load
    name = settings.model or configs[0].base_model_name_or_path
    pretrained, unquantised = _load_base(settings, name, folders)
    limit = settings.longest_prompt(pretrained.max_tokens)
    engine = TransformersEngine(
        pretrained=pretrained,
        default_adapter=settings.default_adapter,
        model_name=Path(name).name if Path(name).is_dir() else name,
        architecture=type(pretrained.model).__name__,
        dtype=str(pretrained.model.dtype).removeprefix("torch."),
        device=str(pretrained.device),
        max_input_tokens=limit,
        target_batch_tokens=settings.max_batch_tokens,  # until it is measured
        prefixes=PrefixStore(settings.prefix_cache_bytes),
        settings=settings,
    )
    for adapter, folder in folders.items():
        served = engine.read(adapter, folder)()
        engine.check(served)
        if adapter in unquantised:
            engine.compare(served, unquantised[adapter])
        engine.adapters[adapter] = served
        logger.info(
            "adapter %s: %d adapted layers, %d stochastic parameters",
            adapter,
            served.adapted_layers,
            served.stochastic_parameters,
        )
    engine = replace(engine, target_batch_tokens=engine.budget())
    engine.warm_up()
    logger.info(
        "%s with %s ready in %.1f s: %s on %s",
        engine.model_name,
        ", ".join(engine.adapters),
        time.perf_counter() - started,
        engine.dtype,
        engine.device,
    )
    return engine


def _load_base(settings: ServeSettings, name: str, folders: dict[str, Path]) -> tuple[Pretrained, dict[str, Predictive]]:
    """The base model, and the adapters' answers before it was quantised; these are empty without quantization."""
    load_as = functools.partial(
        load_pretrained,
        name,
        device=settings.device,
        dtype=settings.dtype,
        trust_remote_code=settings.trust_remote_code,
        gguf_file=settings.gguf_file,
        allow_pickle=settings.allow_pickle,
        device_map=settings.device_map,
    )
    if settings.quantization is None:
        return load_as(), {}
    return load_and_ask(lambda precision: load_as(quantization=precision), settings.quantization, folders, _asker(settings))


def _asker(settings: ServeSettings) -> Callable[[ScalaBLModel, Pretrained], Predictive]:
    """A function that asks an adapter the probe questions, which are compared before and after quantization."""
    probes = Probes(settings.probe_file)

    def ask(model: ScalaBLModel, pretrained: Pretrained) -> Predictive:
        limit = settings.longest_prompt(pretrained.max_tokens)
        prompter = Prompter(model.config.task, pretrained.tokenizer)
        return probes.ask(model, prompter, limit, model.draws(settings.num_samples, settings.seed, settings.draw_scheme))

    return ask


def _local(served: Served) -> LocalAdapter:
    assert isinstance(served, LocalAdapter)  # `_serve` creates no others
    return served


def _usual_job(served: Served, num_samples: int, seed: int) -> Job:
    """The job that most requests have for each input."""
    return SampledJob(served.draws(num_samples, seed), len(served.config.task.choices))


def run_jobs(
    models: Sequence[ScalaBLModel],
    sequences: Sequence[Sequence[int]],
    jobs: Sequence[Job],
    caches: Mapping[ScalaBLModel, PrefixCache | None],
    combinations: Combinations,
) -> list[Result]:
    """Run B prompts, each with its adapter and its job. Sampled ones may reuse prefixes from their adapter's cache."""
    has_rounds = any(job.has_rounds for job in jobs)
    rounds: list[SharedRounds] = []  # empty, or one object, created in the first pass; all sampled prompts are in it

    def run(indices: Sequence[int], draws: Sequence[Draws]) -> list[torch.Tensor]:
        draws_of = dict(zip(indices, draws, strict=True))
        if not rounds:
            prompts = {index: sequences[index] for index in indices}
            adapters = {index: models[index] for index in indices}
            rounds.append(SharedRounds(adapters, prompts, draws_of, caches, combinations, keeps_trunk=has_rounds))
        return list(rounds[0].logits(draws_of).values())

    logits_of = sample_in_rounds(run, jobs, [model.config.temperature for model in models])
    linearization_of: dict[int, Linearization] = {}
    for model in dict.fromkeys(models):
        linearization_of |= _linearize(model, [i for i, own in enumerate(models) if own is model], sequences, jobs)
    return [Result(logits_of.get(index), linearization_of.get(index)) for index in range(len(jobs))]


def _linearize(
    model: ScalaBLModel, prompts: Sequence[int], sequences: Sequence[Sequence[int]], jobs: Sequence[Job]
) -> dict[int, Linearization]:
    """The linearisation of each of an adapter's inputs whose job needs it, by index; computed in one batch."""
    indices = [index for index in prompts if jobs[index].is_linearized]
    if not indices:
        return {}
    batch = TokenBatch.of([sequences[index] for index in indices])
    choices = [jobs[index].choices for index in indices]
    linearization = linearize(model, batch, choices=choices, negligible=NEGLIGIBLE)
    return {index: linearization.of_input(row) for row, index in enumerate(indices)}
