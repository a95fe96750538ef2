"""Tiny random models of several architectures, and adapters for them. The benchmarks share the models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.random_model import (
    ARCHITECTURES,
    COLOURS,
    SPECIAL,
    VOCABULARY,
    adapter_config,
    byte_tokenizer,
    random_adapter,
    random_base,
)
from benchmarks.random_model import (
    SMALL as SMALL,
)
from benchmarks.random_model import (
    fill as fill,
)
from scalabl.config import AdapterConfig, Task
from scalabl.files.adapter_directory import save_adapter
from scalabl.model.scalabl_model import ScalaBLModel


def base_model(name: str = "llama", seed: int = 0) -> PreTrainedModel:
    """A random causal language model of one architecture, float32, frozen."""
    return random_base(ARCHITECTURES[name][0], seed)


def tokenizer(*, chat: bool = False) -> PreTrainedTokenizerFast:
    """The byte tokenizer, if asked for with a chat template."""
    tokenizer = byte_tokenizer()
    if chat:
        tokenizer.chat_template = (
            "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}"
        )
    return tokenizer


CLASSIFICATION = COLOURS
MULTIPLE_CHOICE = Task(
    kind="multiple_choice", template="{input}\nChoices:\n{choices}\nAnswer:", choices=("A", "B", "C", "D")
)


def config_for(name: str = "llama", task: Task = CLASSIFICATION, **changes: Any) -> AdapterConfig:
    """The configuration of an adapter for `base_model(name)`."""
    return adapter_config(f"tiny-{name}", ARCHITECTURES[name][1], task, **changes)


def adapted(name: str = "llama", task: Task = CLASSIFICATION, seed: int = 0, **changes: Any) -> ScalaBLModel:
    """A tiny base model with a random adapter, ready to run."""
    return random_adapter(base_model(name), config_for(name, task, **changes), seed)


MIXTURE: dict[str, Any] = {"members": 3, "format_version": 2}  # the configuration of a mixture


def mixture(name: str = "llama", task: Task = CLASSIFICATION, seed: int = 0, **changes: Any) -> ScalaBLModel:
    """A tiny base model with a random adapter of several members, ready to run."""
    return adapted(name, task, seed, **MIXTURE | changes)


def prefer(model: ScalaBLModel, choices: Sequence[int], by: float = 30.0) -> None:
    """Make these choices' logits larger, at any scalars, so that next to no probability is left to the others."""
    cut = model.adapted["lm_head"].base
    bias = torch.zeros(model.num_choices)
    bias[list(choices)] = by
    cut.bias = nn.Parameter(bias, requires_grad=False)


def write_base(folder: Path, name: str = "llama", *, chat: bool = False) -> Path:
    """A base model with its tokenizer, as a folder that transformers loads."""
    base_model(name).save_pretrained(folder)
    tokenizer(chat=chat).save_pretrained(folder)
    return folder


def write_adapter(folder: Path, name: str = "llama", task: Task = CLASSIFICATION, **changes: Any) -> Path:
    """An adapter directory for `write_base(…, name)`."""
    model = adapted(name, task, **changes)
    save_adapter(folder, model.config, dict(model.adapter_parameters()))
    return folder


def ragged(lengths: Sequence[int] = (3, 9, 1, 14), seed: int = 0) -> list[list[int]]:
    """Random token sequences of these lengths, without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(len(SPECIAL), VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
