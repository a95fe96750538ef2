"""Tiny base models with random weights, a byte-level tokenizer and random adapters: for benchmarks and for tests.

Nothing here is trained. `tests/tiny.py` adds what only tests need.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from scalabl.config import AdapterConfig, Task
from scalabl.files.adapter_directory import save_adapter
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.prompt import Prompter

SPECIAL = ["<pad>", "<bos>", "<eos>"]
VOCABULARY = 256 + len(SPECIAL)

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,  # grouped-query attention
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = LlamaConfig(**SMALL, tie_word_embeddings=True)
LLAMA_TARGETS = ("q_proj", "v_proj", "lm_head")
# name -> (configuration, target modules)
ARCHITECTURES: dict[str, tuple[PreTrainedConfig, tuple[str, ...]]] = {
    "llama": (LLAMA, LLAMA_TARGETS),
    "mistral": (MistralConfig(**SMALL, sliding_window=6), ("q_proj", "k_proj", "v_proj", "o_proj", "lm_head")),
    "qwen2": (Qwen2Config(**SMALL), ("q_proj", "v_proj", "lm_head")),  # biases on q, k and v
    "qwen3": (Qwen3Config(**SMALL, head_dim=8), ("q_proj", "v_proj", "down_proj", "lm_head")),
    "gemma3": (
        Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=6, query_pre_attn_scalar=8),
        ("q_proj", "v_proj", "gate_proj", "lm_head"),
    ),
    "phi3": (Phi3Config(**SMALL), ("qkv_proj", "gate_up_proj", "lm_head")),  # fused projections
    "gpt2": (
        GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=512, bos_token_id=1, eos_token_id=2,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        ),
        ("c_attn", "c_proj", "lm_head"),  # Conv1D: weights stored transposed
    ),
}  # fmt: skip
COLOURS = Task(kind="classification", template="{input}\nLabel:", choices=("red", "green", "blue"))


def random_base(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random causal language model of a configuration, float32, frozen. It has a copy, which it may change."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # transformers starts near zero, where every logit is the same
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model.requires_grad_(False).eval()


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte of UTF-8, after the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(SPECIAL + alphabet)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", model_max_length=512
    )


def adapter_config(base: str, targets: tuple[str, ...], task: Task, **changes: Any) -> AdapterConfig:
    """The configuration of a small adapter for a model with the byte tokenizer."""
    fields: dict[str, Any] = {
        "base_model_name_or_path": base,
        "r": 4,
        "lora_alpha": 8.0,
        "target_modules": targets,
        "task": Prompter(task, byte_tokenizer()).resolved_task,
    }
    return AdapterConfig(**fields | changes)


def fill(model: ScalaBLModel, seed: int = 0, sigma: float = 0.3) -> None:
    """Random adapter values, large enough that every posterior sample gives its own answer."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.adapter_parameters().items():
            if name.endswith("s_log_std"):
                parameter.copy_(torch.log(sigma * (0.5 + torch.rand(parameter.shape, generator=generator))))
            else:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def random_adapter(base: PreTrainedModel, config: AdapterConfig, seed: int = 0) -> ScalaBLModel:
    """A base model with a random adapter, ready to run."""
    model = ScalaBLModel(base, config)
    fill(model, seed)
    return model.requires_grad_(False).eval()


def write_random_models(base: Path, adapter: Path) -> None:
    """A Llama with its tokenizer as one folder, and an adapter for it, whose choices are colours, as another."""
    model = random_base(LLAMA)
    model.save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    config = adapter_config("tiny-llama", LLAMA_TARGETS, COLOURS)
    save_adapter(adapter, config, dict(random_adapter(model, config).adapter_parameters()))
