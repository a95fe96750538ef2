"""The authors' checkpoint, converted, and what their own code computed with it. Lies in `shared`, not in the repository."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from scalabl.config import Task
from scalabl.files.adapter_directory import load_adapter
from scalabl.files.bayesadapt import convert_bayesadapt
from scalabl.model.posterior import Draws
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.model.token_batch import TokenBatch

CHECKPOINT = Path("fixtures") / "bayesadapt_qwen2_r8"


@dataclass(frozen=True)
class Published:
    """The converted adapter on its base model, and the authors' logits."""

    model: ScalaBLModel
    batch: TokenBatch
    draws: Draws
    logits: Tensor  # [B, K, C]
    mean_logits: Tensor  # [B, C]


def load_published(shared: Path, adapter: Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Published:
    """Convert the checkpoint into the folder `adapter` and load it.

    Args:
        shared: the folder that holds it.
    """
    folder = shared / CHECKPOINT
    meta = json.loads((folder / "meta.json").read_text())
    expected = load_file(folder / "expected.safetensors")
    tokens = meta["class_token_ids"]
    task = Task(
        kind="multiple_choice",
        template="{input}\n{choices}\nAnswer:",
        choices=tuple("ABCDEFGHIJ"[: len(tokens)]),
        choice_tokens=tuple(tokens),
    )
    convert_bayesadapt(folder / "state_dict.pt", adapter, base_model="tiny-qwen2", lora_alpha=meta["lora_alpha"], task=task)
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype).to(device)
    model = load_adapter(base, adapter)
    noise = torch.cat([expected[f"noise.{name}"] for name in model.adapted], dim=1)  # [K, P], in the model's order
    return Published(
        model,
        TokenBatch(expected["input_ids"], expected["attention_mask"]),
        Draws(0, "gaussian", noise),
        expected["logits"],
        expected["mean_logits"],
    )
