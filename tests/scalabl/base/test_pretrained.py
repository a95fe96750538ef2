"""Loading a base model: what is allowed, and what is said when it cannot be."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BloomConfig, LlamaConfig, MptConfig, PreTrainedConfig

from scalabl.base.pretrained import load_pretrained, longest_prompt, resolve_device, resolve_dtype
from scalabl.errors import BaseModelError
from tests import tiny


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.write_base(tmp_path / "base")


def test_a_folder_loads_frozen_in_eval_mode_with_its_limit(base: Path) -> None:
    pretrained = load_pretrained(str(base), device="cpu")
    assert pretrained.max_tokens == 512
    assert not pretrained.model.training
    assert not any(parameter.requires_grad for parameter in pretrained.model.parameters())
    assert pretrained.model.dtype == torch.float32
    assert load_pretrained(str(base), device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("config", "tokens", "longest"),
    [
        (LlamaConfig(max_position_embeddings=300), 200, 200),
        (LlamaConfig(max_position_embeddings=300), int(1e30), 300),
        (MptConfig(max_seq_len=300), int(1e30), 300),
        (BloomConfig(), 200, 200),
        (BloomConfig(), int(1e30), None),  # no limit on positions, and the tokenizer's word for none
    ],
)
def test_the_longest_prompt_is_what_the_model_or_the_tokenizer_says(
    config: PreTrainedConfig, tokens: int, longest: int | None
) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.model_max_length = tokens
    assert longest_prompt(config, tokenizer) == longest


def test_pickled_weights_are_refused(base: Path) -> None:
    (base / "model.safetensors").unlink()
    torch.save(tiny.base_model().state_dict(), base / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match=r"cannot be loaded: .*safetensors"):
        load_pretrained(str(base), device="cpu")
    allowed = load_pretrained(str(base), device="cpu", allow_pickle=True).model
    expected = tiny.base_model().state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in allowed.state_dict().items())


class Bomb:
    """Runs a function of its choice when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.marker,)


def test_a_pickle_that_runs_code_is_refused_even_where_pickles_are_allowed(base: Path, tmp_path: Path) -> None:
    (base / "model.safetensors").unlink()
    marker = tmp_path / "ran"
    torch.save({"model.embed_tokens.weight": Bomb(marker)}, base / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        load_pretrained(str(base), device="cpu", allow_pickle=True)
    assert not marker.exists()


def test_a_base_model_without_some_of_its_weights_is_refused(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    del weights["model.layers.1.self_attn.q_proj.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=r"lack 1 of its weights, first model\.layers\.1\.self_attn\.q_proj"):
        load_pretrained(str(base), device="cpu")


def write_gguf(file: Path) -> None:
    """The tiny Llama as one GGUF file with its tokenizer, float32."""
    model, tokenizer = tiny.base_model(), tiny.tokenizer()
    writer = gguf.GGUFWriter(str(file), "llama")
    config = model.config
    heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.hidden_size
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(width)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(width // heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    writer.add_token_list([*tokens[:-1], "ab"])  # transformers wants a merge, and that needs its token
    writer.add_token_types([gguf.TokenType.CONTROL] * len(tiny.SPECIAL) + [gguf.TokenType.NORMAL] * 256)
    writer.add_token_merges(["a b"])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        for module, count in (("q_proj", heads), ("k_proj", kv_heads)):
            if module in name:  # the format keeps rotary halves interleaved
                tensor = tensor.reshape(count, 2, -1, width).transpose(1, 2).reshape(-1, width)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_gives_the_same_weights(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    loaded = load_pretrained(str(tmp_path), device="cpu", gguf_file="tiny.gguf")
    expected = tiny.base_model().state_dict()
    assert loaded.model.state_dict().keys() == expected.keys()
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    assert loaded.max_tokens == 512
    with pytest.raises(BaseModelError, match="cannot be loaded"):
        load_pretrained(str(tmp_path), device="cpu", gguf_file="absent.gguf")


def test_a_name_that_leads_nowhere_is_named() -> None:
    with pytest.raises(
        BaseModelError, match="'nobody/nothing' cannot be loaded; no folder has that name, so it was looked up"
    ):
        load_pretrained("nobody/nothing", device="cpu")


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=f"the base model {str(tmp_path)!r} cannot be loaded: "):
        load_pretrained(str(tmp_path), device="cpu")


def test_a_device_that_is_not_there_is_named() -> None:
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(BaseModelError, match="device 'abacus' cannot be used"):
        resolve_device("abacus")
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
