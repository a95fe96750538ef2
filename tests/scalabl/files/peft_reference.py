"""PEFT itself, as what exports and conversions are compared with: its imports, the warnings it gives, its logits."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from scalabl.prompt import Prompter
from tests import tiny

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import LoraConfig, PeftModel, get_peft_model

__all__ = ["PEFT_WARNINGS", "TOKENS", "LoraConfig", "PeftModel", "get_peft_model", "peft_logits"]

# PEFT warns of what this is about: adapters on a head that shares its weights, Conv1D beside linear layers.
PEFT_WARNINGS = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]

TOKENS = Prompter(tiny.CLASSIFICATION, tiny.tokenizer()).choice_tokens


def peft_logits(model: Any, sequences: list[list[int]], tokens: Sequence[int] = TOKENS) -> Tensor:
    """PEFT's logits [B, C] at the last position over the choice tokens, one input at a time."""
    with torch.inference_mode():
        rows = [model(input_ids=torch.tensor([ids])).logits[0, -1, list(tokens)] for ids in sequences]
    return torch.stack(rows)
