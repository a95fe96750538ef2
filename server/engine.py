"""What the server asks of the method: one loaded model with its prompts and draws. Runs on the worker's thread."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from scalabl.adapter_io import load_adapter, read_config
from scalabl.errors import AdapterError
from scalabl.model import ScalaBLModel, TokenBatch
from scalabl.posterior import Draws
from scalabl.pretrained import load_pretrained
from scalabl.prompt import Prompter
from server.settings import ServeSettings

logger = logging.getLogger("scalabl")

CPU_TARGET_BATCH_TOKENS = 2048


@dataclass(frozen=True, eq=False)
class Engine:
    """A base model with its adapter: token ids in, logits over the choices out."""

    model: ScalaBLModel
    prompter: Prompter
    model_name: str
    adapter_name: str
    max_input_tokens: int
    target_batch_tokens: int
    settings: ServeSettings

    @functools.lru_cache(maxsize=64)  # noqa: B019  (one engine lives as long as the process)
    def draws(self, num_samples: int, seed: int) -> Draws:
        """The draws of a seed; the same object for the same arguments, so that a batch holds each table once."""
        return self.model.draws(num_samples, seed, self.settings.draw_scheme)

    def run(self, sequences: Sequence[Sequence[int]], draws: Sequence[Draws]) -> list[Tensor]:
        """One forward pass: B prompts, each with its draws -> B tensors [K, C] float32 on the CPU."""
        return [logits.cpu() for logits in self.model.logits_each(TokenBatch.of(sequences), draws)]


def load_engine(settings: ServeSettings) -> Engine:
    """Load, check and warm up what the settings name.

    Raises:
        AdapterError, BaseModelError, PromptError: what is wrong, and with which file, module or field.
    """
    started = time.perf_counter()
    disable_progress_bar()  # a log has no use for it
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    config = read_config(settings.adapter)  # cheap checks before the expensive load
    name = settings.model or config.base_model_name_or_path
    pretrained = load_pretrained(
        name, device=settings.device, dtype=settings.dtype, trust_remote_code=settings.trust_remote_code
    )
    prompter = Prompter(config.task, pretrained.tokenizer)
    if prompter.mismatched:
        raise AdapterError(
            f"the adapter was trained with another token for the choice {prompter.mismatched[0]!r} than this base model's "
            f"tokenizer gives; serve it with the base model it was trained on ({config.base_model_name_or_path})"
        )
    model = load_adapter(pretrained.model, settings.adapter)
    limit = min(settings.max_input_tokens or pretrained.max_tokens, pretrained.max_tokens)
    target = settings.target_batch_tokens
    if target is None:
        target = CPU_TARGET_BATCH_TOKENS if model.device.type == "cpu" else settings.max_batch_tokens
    engine = Engine(
        model=model,
        prompter=prompter,
        model_name=Path(name).name if Path(name).is_dir() else name,
        adapter_name=settings.adapter_name or settings.adapter.resolve().name,
        max_input_tokens=limit,
        target_batch_tokens=min(target, settings.max_batch_tokens),
        settings=settings,
    )
    model.warm_up()
    engine.run([[0] * min(16, limit)], [engine.draws(settings.num_samples, settings.seed)])
    logger.info(
        "%s with adapter %s ready in %.1f s: %d adapted layers, %d stochastic parameters, %s on %s",
        engine.model_name,
        engine.adapter_name,
        time.perf_counter() - started,
        len(model.adapted),
        model.num_stochastic_parameters,
        str(model.base.dtype).removeprefix("torch."),
        model.device,
    )
    return engine
