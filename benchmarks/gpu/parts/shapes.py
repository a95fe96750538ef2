"""Base models with random weights in the shapes of real ones, made on the device, and adapters for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.random_model import COLOURS, SMALL, adapter_config
from scalabl.config import AdapterConfig
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.passes.probes import find_shared_work

RANK = 8
TARGETS = ("q_proj", "v_proj")
_LLAMA: dict[str, Any] = {"max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHAPES: dict[str, dict[str, Any]] = {
    "1B": _LLAMA  # of Llama 3.2 1B
    | {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    },
    "7B": _LLAMA  # of Llama 2 7B
    | {
        "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "tie_word_embeddings": False,
    },
}  # fmt: skip
DRY = SMALL | {"num_hidden_layers": 3, "head_dim": 16, "tie_word_embeddings": True}


def random_llama(name: str, device: str) -> PreTrainedModel:
    """A Llama of one of `SHAPES` in bfloat16, frozen; on a CPU a tiny one instead."""
    config = LlamaConfig(**(DRY if device == "cpu" else SHAPES[name]))
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.requires_grad_(False).eval()


def config_of(base: PreTrainedModel, *, last_third: bool = False) -> AdapterConfig:
    """An adapter on every q_proj and v_proj, of all blocks or of the last third of them."""
    depth = base.config.num_hidden_layers
    layers = tuple(range(depth - depth // 3, depth)) if last_third else None
    return adapter_config("random", TARGETS, COLOURS, r=RANK, lora_alpha=2.0 * RANK, layers_to_transform=layers)


def random_scalabl(base: PreTrainedModel, *, last_third: bool = False) -> ScalaBLModel:
    """A base model with a random adapter whose samples differ, and with the shortcuts that the probes allow."""
    model = ScalaBLModel(base, config_of(base, last_third=last_third))
    model.reset_adapter(0, std_init=0.3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.adapted.values():
            layer.lora_B.copy_(0.02 * torch.randn(layer.lora_B.shape, generator=generator))
    find_shared_work(model.requires_grad_(False).eval())
    return model


def pass_flops(base: PreTrainedModel, lengths: list[int], rows: int) -> float:
    """Operations of a pass over prompts of these lengths with so many rows each: products with weights and attention.

    A multiplication and an addition are two. The head is left out, which computes one token of each row.
    """
    config = base.config
    weights = sum(m.in_features * m.out_features for m in base.model.layers.modules() if isinstance(m, nn.Linear))
    width = config.num_attention_heads * config.head_dim
    attention = config.num_hidden_layers * 2 * width * sum(length**2 for length in lengths)  # causal: half of 4 T^2 d
    return float(rows * (2 * weights * sum(lengths) + attention))


def ragged_prompts(longest: int, count: int, vocabulary: int) -> list[list[int]]:
    """Random prompts of which the shortest has 5 / 8 of the tokens of the longest."""
    generator = torch.Generator().manual_seed(longest)
    lengths = [max(1, longest - (longest * 3 // 8) * index // max(1, count - 1)) for index in range(count)]
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]
