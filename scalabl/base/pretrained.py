"""Loading a base model and its tokenizer with transformers: device, dtype, quantization, safe weight formats, clear errors.

Device maps are in `placement`, int8 layers in `int8`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from scalabl.base.heap import keep_freed_memory
from scalabl.base.int8 import to_int8
from scalabl.base.placement import device_of, left_out, read_device_map
from scalabl.config import Quantization
from scalabl.errors import BaseModelError

POSITIONS = ("max_position_embeddings", "max_seq_len")  # the names of a configuration's limit on positions
UNLIMITED = 10**9  # a tokenizer without a limit has 1e30
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Pretrained:
    """A base model, frozen and in eval mode, with its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int | None  # the longest prompt that the model supports; None: as long as memory allows

    @property
    def device(self) -> torch.device:
        """The device on which a pass begins. The whole model is on it, unless a device map divides the model."""
        return device_of(self.model.get_input_embeddings())


def resolve_device(device: str) -> torch.device:
    """The torch device of a name; `auto` is a GPU if there is one, else the CPU.

    Raises:
        BaseModelError: the device is unknown or not available.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise BaseModelError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    return resolved


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The torch dtype of a name; `auto` is bfloat16 on GPUs that have it, else float32 (bfloat16 is slow on most CPUs)."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return DTYPES[dtype]


def load_skeleton(name: str, *, trust_remote_code: bool = False) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A base model's modules and shapes without its weights (on torch's meta device), and its tokenizer.

    Raises:
        BaseModelError: as for `load_pretrained`, except for errors of the weights.
    """
    with _load_errors(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return model, tokenizer


@contextmanager
def _load_errors(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # transformers, tokenizers, safetensors and a model's own code raise errors of many kinds
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        hint = "" if Path(name).is_dir() else "; no folder has that name, so it was looked up as a Hugging Face hub id"
        raise BaseModelError(f"the base model {name!r} cannot be loaded{hint}: {first}") from error


def load_pretrained(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
    allow_pickle: bool = False,
    quantization: Quantization | None = None,
    device_map: str | None = None,
) -> Pretrained:
    """Load a causal language model and its tokenizer from a hub id or a folder, from safetensors or GGUF weights.

    On a CPU this also makes the process keep memory that passes free; see `heap`.

    Args:
        gguf_file: name of a GGUF file of the model; its weights are converted to `dtype`.
        allow_pickle: also accept weights in PyTorch's pickle format; transformers reads them with `weights_only`.
        quantization: of all linear layers except the head: int8 on a CPU, or one of bitsandbytes' for GPUs.
        device_map: how to divide the model over devices, instead of `device`; see `placement.read_device_map`.

    Raises:
        BaseModelError: the model does not exist, is not a causal language model, has no safetensors weights, or cannot be
            loaded with this device, device map or quantization.
    """
    torch_device = resolve_device(device)
    weights: dict[str, Any] = {
        "dtype": resolve_dtype(dtype, torch_device),
        "use_safetensors": None if allow_pickle else True,
    }
    if device_map is not None:
        weights["device_map"] = read_device_map(device_map)
    if quantization in ("bnb-8bit", "bnb-4bit"):
        weights = {
            "device_map": {"": torch_device},
            "quantization_config": _bitsandbytes(quantization, weights["dtype"]),
            **weights,
        }
    with _load_errors(name):
        source = {"trust_remote_code": trust_remote_code} | ({"gguf_file": gguf_file} if gguf_file else {})
        config = AutoConfig.from_pretrained(name, **source)
        tokenizer = AutoTokenizer.from_pretrained(name, **source)
        model, loading = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **weights, **source)
    if missing := sorted(loading["missing_keys"]):  # transformers would only warn and fill them with random numbers
        raise BaseModelError(
            f"the files of the base model {name!r} lack {len(missing)} of its weights, first {missing[0]}; "
            "use a complete copy of the model"
        )
    if isinstance(parts := weights.get("device_map"), dict) and (left := left_out(model, parts)):
        raise BaseModelError(f"device map {device_map!r} does not place {left!r}; add it, or a module that contains it")
    if "device_map" not in weights:
        model.to(torch_device)
    model.requires_grad_(False).eval()
    if quantization == "int8":
        to_int8(model)
    if torch_device.type == "cpu":
        keep_freed_memory()
    return Pretrained(model, tokenizer, longest_prompt(config, tokenizer))


def _bitsandbytes(quantization: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig:
    if missing := [package for package in ("bitsandbytes", "accelerate") if find_spec(package) is None]:
        raise BaseModelError(
            f"quantization {quantization} needs the package {missing[0]}; "
            "install it with: pip install 'scalabl[bitsandbytes]'"
        )
    if quantization == "bnb-8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def longest_prompt(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The largest number of tokens that the base model and its tokenizer support; None if neither says one."""
    text = config.get_text_config()
    limits = [*(getattr(text, name, None) for name in POSITIONS), tokenizer.model_max_length]
    return min((int(limit) for limit in limits if limit and 0 < limit < UNLIMITED), default=None)


def output_head(model: PreTrainedModel) -> tuple[str, int]:
    """(name, number of rows) of a base model's output head, which has a row for each token; ("", 0) if there is none."""
    head = model.get_output_embeddings()
    return next(((name, head.weight.shape[0]) for name, module in model.named_modules() if module is head), ("", 0))
