"""What the server asks of the method: one base model, the adapters over it, their prompts and draws."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from scalabl.adapter_io import check_effect, read_adapter, read_config
from scalabl.errors import AdapterError, ScalaBLError
from scalabl.linearized import SPREAD_LIMIT, relative_spread
from scalabl.model import ScalaBLModel
from scalabl.posterior import Draws, Scheme
from scalabl.pretrained import Pretrained, load_pretrained
from scalabl.prompt import Prompter
from server.faults import classify
from server.methods import Job, Result, run_jobs
from server.problems import ProblemError
from server.settings import ServeSettings

logger = logging.getLogger("scalabl")

CPU_TARGET_BATCH_TOKENS = 2048


class CapacityError(ScalaBLError):
    """What the settings allow does not fit in this machine's memory."""


@dataclass(eq=False)
class Served:
    """One adapter, ready to answer.

    Attributes:
        draws: (num_samples, seed) -> the draws; the same object for the same arguments, so that a batch holds each table
            once. Any thread may ask.
        relative_spread: by which a linearisation is trusted or not.
    """

    name: str
    model: ScalaBLModel
    prompter: Prompter
    scheme: Scheme
    draws: Callable[[int, int], Draws] = field(init=False)
    relative_spread: float = field(init=False)

    def __post_init__(self) -> None:
        # A cache of its own, so that it goes when the adapter goes.
        self.draws = functools.lru_cache(maxsize=64)(
            lambda num_samples, seed: self.model.draws(num_samples, seed, self.scheme)
        )
        self.relative_spread = relative_spread(self.model)


@dataclass(frozen=True, eq=False)
class Engine:
    """A base model with its adapters: token ids in, logits over an adapter's choices out.

    `run`, `check` and `warm_up` belong to the model's thread.
    """

    pretrained: Pretrained
    adapters: dict[str, Served]
    default_adapter: str
    model_name: str
    max_input_tokens: int
    target_batch_tokens: int
    settings: ServeSettings

    def adapter(self, name: str | None) -> Served:
        """The adapter of this name; None is the default one.

        Raises:
            ProblemError: `unknown-adapter`, with the names that there are.
        """
        served = self.adapters.get(self.default_adapter if name is None else name)
        if served is None:
            names = ", ".join(map(repr, sorted(self.adapters))) or "no adapter"
            wanted = "the default adapter" if name is None else repr(name)
            raise ProblemError("unknown-adapter", f"adapter: {wanted} is not loaded; this server has {names}")
        return served

    def run(self, served: Served, sequences: Sequence[Sequence[int]], jobs: Sequence[Job]) -> list[Result]:
        """One batch: B prompts of one adapter, each with its job."""
        try:
            return run_jobs(served.model, sequences, jobs)
        finally:
            if self.adapters.get(served.name) is not served:  # unloaded or replaced while its requests waited
                served.model.detach()

    def read(self, folder: Path) -> ScalaBLModel:
        """Read an adapter's files. Any thread may, while the model's thread runs passes.

        Raises:
            AdapterError: what is wrong, and with which file, module or field.
        """
        return read_adapter(self.pretrained.model, folder)

    def serve(self, name: str, model: ScalaBLModel) -> Served:
        """An adapter with its prompts. Runs on the prompts' thread.

        Raises:
            AdapterError, PromptError: the adapter's task does not fit the base model's tokenizer.
        """
        prompter = Prompter(model.config.task, self.pretrained.tokenizer)
        if prompter.mismatched:
            raise AdapterError(
                f"the adapter was trained with another token for the choice {prompter.mismatched[0]!r} than this base "
                "model's tokenizer gives; serve it with the base model it was trained on "
                f"({model.config.base_model_name_or_path})"
            )
        return Served(name, model, prompter, self.settings.draw_scheme)

    def check(self, served: Served) -> None:
        """The first passes of an adapter: what its layers see, its effect, and every launch shape.

        Raises:
            AdapterError: it changes no logit, or has more stochastic parameters than the draw scheme reaches.
        """
        try:
            try:
                served.draws(self.settings.num_samples, self.settings.seed)
            except ValueError as error:
                raise AdapterError(str(error)) from None
            served.model.find_shared_work()
            check_effect(served.model)
            served.model.warm_up()
            if served.relative_spread > SPREAD_LIMIT:
                logger.warning(
                    "adapter %s: sigma is %.2g of |mu| in the median; its answers by the method linearized will be biased",
                    served.name,
                    served.relative_spread,
                )
        except BaseException:
            served.model.detach()
            raise

    def warm_up(self) -> None:
        """Passes of the default adapter, of the largest shapes when the settings say so.

        Raises:
            CapacityError: a pass that requests may ask for does not fit in memory.
        """
        served, settings = self.adapter(None), self.settings
        shapes = [(1, settings.num_samples, min(16, self.max_input_tokens))]  # inputs, samples, length
        full = settings.warmup == "full" or (settings.warmup == "auto" and served.model.device.type != "cpu")
        if full:
            longest = min(self.max_input_tokens, settings.max_batch_tokens)
            for tokens, length in ((self.target_batch_tokens, min(16, longest)), (settings.max_batch_tokens, longest)):
                rows = max(1, tokens // length)
                samples = min(settings.num_samples, rows)
                shapes.append((rows // samples, samples, length))
        for inputs, samples, length in shapes:
            try:
                self.run(served, [[0] * length] * inputs, [served.draws(samples, settings.seed)] * inputs)
            except Exception as error:
                if classify(error).kind != "out-of-memory":
                    raise
                raise CapacityError(
                    f"a pass over {inputs} inputs x {samples} samples x {length} tokens, which --max-batch-tokens "
                    f"{settings.max_batch_tokens} allows, does not fit in memory; lower it or --max-input-tokens"
                ) from None


def load_engine(settings: ServeSettings) -> Engine:
    """Load, check and warm up what the settings name.

    Raises:
        AdapterError, BaseModelError, PromptError: what is wrong, and with which file, module or field.
    """
    started = time.perf_counter()
    disable_progress_bar()  # a log has no use for it
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    folders = settings.adapter_folders()
    configs = [read_config(folder) for folder in folders.values()]  # cheap checks before the expensive load
    name = settings.model or configs[0].base_model_name_or_path
    pretrained = load_pretrained(
        name,
        device=settings.device,
        dtype=settings.dtype,
        trust_remote_code=settings.trust_remote_code,
        gguf_file=settings.gguf_file,
        allow_pickle=settings.allow_pickle,
    )
    limit = min(settings.max_input_tokens or pretrained.max_tokens, pretrained.max_tokens)
    target = settings.target_batch_tokens
    if target is None:
        target = CPU_TARGET_BATCH_TOKENS if pretrained.model.device.type == "cpu" else settings.max_batch_tokens
    engine = Engine(
        pretrained=pretrained,
        adapters={},
        default_adapter=settings.default_adapter,
        model_name=Path(name).name if Path(name).is_dir() else name,
        max_input_tokens=limit,
        target_batch_tokens=min(target, settings.max_batch_tokens),
        settings=settings,
    )
    for each, folder in folders.items():
        served = engine.serve(each, engine.read(folder))
        engine.check(served)
        engine.adapters[each] = served
        logger.info(
            "adapter %s: %d adapted layers, %d stochastic parameters",
            each,
            len(served.model.adapted),
            served.model.num_stochastic_parameters,
        )
    engine.warm_up()
    logger.info(
        "%s with %s ready in %.1f s: %s on %s",
        engine.model_name,
        ", ".join(engine.adapters),
        time.perf_counter() - started,
        str(pretrained.model.dtype).removeprefix("torch."),
        pretrained.model.device,
    )
    return engine
