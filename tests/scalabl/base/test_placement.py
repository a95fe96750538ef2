"""A base model divided by a device map, here between memory and disk: the same answers as in one piece."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from scalabl.base import placement
from scalabl.base.placement import device_of, is_divided, read_device_map
from scalabl.base.pretrained import Pretrained, load_pretrained
from scalabl.errors import BaseModelError
from scalabl.files.adapter_directory import load_adapter
from scalabl.model.token_batch import TokenBatch
from scalabl.uncertainty.linearized import linearize
from tests import tiny

BATCH = TokenBatch.of(tiny.ragged())
DIVIDED: dict[str, dict[str, str]] = {
    "llama": {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "lm_head": "cpu"},
    "qwen2": {"model.embed_tokens": "disk", "model.layers.0": "disk", "model.layers.1": "cpu", "lm_head": "disk"},
    "phi3": {"model.embed_tokens": "disk", "model.layers": "disk", "lm_head": "cpu"},
}  # between them, everything is on either side once; the head is tied to the embeddings, or on disk itself

Divide = Callable[[str], tuple[Pretrained, Path]]


@pytest.fixture
def divide(tmp_path: Path) -> Divide:
    def load(name: str) -> tuple[Pretrained, Path]:
        base = tiny.write_base(tmp_path / name, name)
        where = tmp_path / f"{name}.json"
        where.write_text(json.dumps(DIVIDED[name] | {"model.norm": "cpu", "model.rotary_emb": "cpu"}), encoding="utf-8")
        return load_pretrained(str(base), device_map=str(where)), base

    return load


@pytest.mark.parametrize("name", DIVIDED)
@pytest.mark.parametrize("layers", [None, (1,)], ids=["every block", "the last block"])
def test_a_divided_base_gives_the_answers_of_a_whole_one(
    name: str, layers: tuple[int, ...] | None, divide: Divide, tmp_path: Path
) -> None:
    pretrained, base = divide(name)
    assert is_divided(pretrained.model)
    assert any(parameter.is_meta for parameter in pretrained.model.parameters()), "something is on disk"
    adapter = tiny.write_adapter(tmp_path / "adapter", name, layers_to_transform=layers)
    found, expected = (load_adapter(each.model, adapter) for each in (pretrained, load_pretrained(str(base), device="cpu")))
    assert found.device == torch.device("cpu")
    assert not any(parameter.is_meta for parameter in found.adapter_parameters().values())
    draws = found.draws(5)
    assert torch.allclose(found.logits(BATCH, draws), expected.logits(BATCH, draws), atol=1e-5)
    assert torch.allclose(found.base_logits(BATCH), expected.base_logits(BATCH), atol=1e-5)
    linear, whole = linearize(found, BATCH), linearize(expected, BATCH)
    assert torch.allclose(linear.scaled_jacobian, whole.scaled_jacobian, atol=1e-5)
    assert (found.trunk.verified, found.trunk.depth) == (expected.trunk.verified, expected.trunk.depth)
    assert any(parameter.is_meta for parameter in pretrained.model.parameters()), "it still is"


def test_the_trunk_can_start_from_its_states_and_runs_again_afterwards(divide: Divide, tmp_path: Path) -> None:
    pretrained, _ = divide("qwen2")  # whose first block is on disk
    model = load_adapter(pretrained.model, tiny.write_adapter(tmp_path / "adapter", "qwen2", layers_to_transform=(1,)))
    ids, lengths = BATCH.right_padded()
    draws, states = model.draws(3), model.trunk_states(ids, lengths)
    expected = model.logits(BATCH, draws)
    assert torch.allclose(model.logits(BATCH, draws, states), expected, atol=1e-6)
    assert torch.equal(model.logits(BATCH, draws), expected), "its blocks have their own forward again"


def test_a_layer_computes_where_its_hook_says() -> None:
    layer = nn.Linear(2, 3, device="meta")
    assert device_of(layer) == torch.device("meta")
    layer._hf_hook = type("Hook", (), {"execution_device": "cuda:1"})()
    assert device_of(layer) == torch.device("cuda", 1)
    layer._hf_hook = type("Several", (), {"hooks": [object(), type("Hook", (), {"execution_device": "cpu"})()]})()
    assert device_of(layer) == torch.device("cpu")
    assert device_of(nn.Identity()) == torch.device("cpu")


@pytest.mark.parametrize("way", ["auto", "balanced", "balanced_low_0", "sequential"])
def test_accelerates_own_ways(way: str, tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base")
    pretrained = load_pretrained(str(base), device_map=way)
    model = load_adapter(pretrained.model, tiny.write_adapter(tmp_path / "adapter"))
    assert torch.isfinite(model.logits(BATCH, model.draws(2))).all()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "neither one of auto, balanced, balanced_low_0, sequential nor a readable JSON file"),
        ("{", "nor a readable JSON file"),
        ("[0]", "must be a JSON object that maps module names to devices"),
        ("{}", "must be a JSON object"),
        ('{"model": 1.5}', "the device of 'model' is 1.5; use a GPU number, a device name or disk"),
        ('{"model": true}', "the device of 'model' is True"),
        ('{"model": "abacus"}', "the device 'abacus' of 'model' cannot be used"),
        ('{"model": 77}', "the device 77 of 'model' cannot be used"),
    ],
)
def test_a_map_that_cannot_be_is_refused(content: Any, said: str, tmp_path: Path) -> None:
    file = tmp_path / "map.json"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(BaseModelError, match=said):
        read_device_map(str(file))


def test_a_map_that_leaves_a_part_out_is_refused(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base")
    parts = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1.mlp": "cpu", "model.norm": "cpu"}
    (tmp_path / "map.json").write_text(json.dumps(parts | {"model.rotary_emb": "cpu"}), encoding="utf-8")
    with pytest.raises(BaseModelError, match=r"map\.json' does not place 'model\.layers\.1\.self_attn\.q_proj\.weight'"):
        load_pretrained(str(base), device_map=str(tmp_path / "map.json"))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "find_spec", lambda name: None)
    with pytest.raises(BaseModelError, match="needs the package accelerate; install it with: pip install accelerate"):
        read_device_map("auto")
