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
from scalabl.evaluation.encoded import EncodedSet
from scalabl.evaluation.novelty_fit import calibrated_reference, calibration_of, description_of, make_reference
from scalabl.files.adapter_directory import load_adapter, save_adapter
from scalabl.files.novelty_file import save_novelty
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.uncertainty.novelty import NoveltyReference


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


def add_novelty(
    folder: Path,
    name: str = "llama",
    *,
    calibrated: bool = True,
    level: float = 0.1,
    num_samples: int = 8,
    prompts: tuple[EncodedSet, EncodedSet] | None = None,
) -> NoveltyReference:
    """Give an adapter of `write_adapter` a novelty reference.

    Args:
        prompts: of the reference and of its calibration; by default some that `encoded_rows` makes.
    """
    model = load_adapter(base_model(name), folder)
    rows, held_out = prompts or (encoded_rows(60), encoded_rows(40, seed=1))
    reference = make_reference(model, rows, most_rows=50)
    novelty = description_of(folder, model.config, rows, reference)
    if calibrated:
        draws = model.draws(num_samples)
        reference = calibrated_reference(model, held_out, draws, reference)
        novelty = novelty.model_copy(update={"calibration": calibration_of(held_out, draws, level)})
    save_novelty(folder, model.config, novelty, reference)
    return reference


def encoded_rows(count: int, seed: int = 0) -> EncodedSet:
    """Prompts of one kind with answers: each holds one of few tokens, repeated."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(len(SPECIAL), len(SPECIAL) + 6, (count,), generator=generator).tolist()
    lengths = torch.randint(3, 9, (count,), generator=generator).tolist()
    sequences = [[token] * length for token, length in zip(tokens, lengths, strict=True)]
    return EncodedSet(sequences, torch.tensor(tokens) % 3, torch.full((count,), 3), "rows.jsonl")


def ragged(lengths: Sequence[int] = (3, 9, 1, 14), seed: int = 0) -> list[list[int]]:
    """Random token sequences of these lengths, without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(len(SPECIAL), VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
