"""PEFT itself, as what exports and conversions are compared with: its imports, the warnings it gives, its answers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from scalabl.prompt import Prompter
from tests import tiny

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from peft import LoraConfig, PeftModel, get_peft_model

__all__ = ["PEFT_WARNINGS", "TOKENS", "LoraConfig", "PeftModel", "get_peft_model", "peft_logits", "trained_classifier"]

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


def trained_classifier(
    base: Path,
    output: Path,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    classes: Sequence[int],
    *,
    steps: int = 8,
    **settings: Any,
) -> tuple[Tensor, Tensor]:
    """Train a LoRA for sequence classification with PEFT, and save it.

    Returns:
        Its probabilities [B, C] of the texts, each alone, and as one padded batch.
    """
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1 + max(classes), dtype=torch.float32)
    model.config.pad_token_id = tokenizer.pad_token_id
    model = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **settings))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    batch, labels = tokenizer(list(texts), padding=True, return_tensors="pt"), torch.tensor(classes)
    for _ in range(steps):
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(output)
    model.eval()
    with torch.inference_mode():
        alone = [model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1) for text in texts]
        return torch.cat(alone), model(**batch).logits.softmax(-1)
