"""What the tests are made of: tiny random models, a byte-level tokenizer and adapters with something to say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
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

# name -> (configuration, target modules)
ARCHITECTURES: dict[str, tuple[PreTrainedConfig, tuple[str, ...]]] = {
    "llama": (LlamaConfig(**SMALL, tie_word_embeddings=True), ("q_proj", "v_proj", "lm_head")),
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


def base_model(name: str = "llama", seed: int = 0) -> PreTrainedModel:
    """A random causal language model of one architecture, float32, frozen."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(ARCHITECTURES[name][0], dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # transformers starts near zero, where every logit is the same
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return model.requires_grad_(False).eval()


def tokenizer(*, chat: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte of UTF-8, after the special ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(SPECIAL + alphabet)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", model_max_length=512
    )
    if chat:
        made.chat_template = (
            "{% for m in messages %}[{{ m.role }}]{{ m.content }}[end]{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}"
        )
    return made


CLASSIFICATION = Task(kind="classification", template="{input}\nLabel:", choices=("red", "green", "blue"))
MULTIPLE_CHOICE = Task(
    kind="multiple_choice", template="{input}\nChoices:\n{choices}\nAnswer:", choices=("A", "B", "C", "D")
)


def config_for(name: str = "llama", task: Task = CLASSIFICATION, **changes: Any) -> AdapterConfig:
    """The configuration of an adapter for `base_model(name)`."""
    fields: dict[str, Any] = {
        "base_model_name_or_path": f"tiny-{name}",
        "r": 4,
        "lora_alpha": 8.0,
        "target_modules": ARCHITECTURES[name][1],
        "task": Prompter(task, tokenizer()).resolved_task,
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


def adapted(name: str = "llama", task: Task = CLASSIFICATION, seed: int = 0, **changes: Any) -> ScalaBLModel:
    """A tiny base model with a random adapter, ready to run."""
    model = ScalaBLModel(base_model(name), config_for(name, task, **changes))
    fill(model, seed)
    return model.requires_grad_(False).eval()


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
