"""LoRAs by name: what a name covers, and that its folder holds just that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from scalabl.errors import AdapterError
from scalabl.files.sample_loras import SampleLoras
from tests import tiny


def _read(folder: Path, **changes: Any) -> SampleLoras:
    return SampleLoras.read(folder, tiny.base_model(), **{"num_samples": 3, "seed": 0, "scheme": "sobol"} | changes)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return tiny.write_adapter(tmp_path / "adapter")


def test_names_do_not_depend_on_how_many_there_are(adapter: Path) -> None:
    assert _read(adapter, num_samples=5).names[:3] == _read(adapter).names


@pytest.mark.parametrize(
    "changes",
    [{"lora_alpha": 4.0}, {"posterior_scale": 0.5}, {"seed": 1}, {"draws_seed": 1}, {"scheme": "antithetic"}],
    ids=str,
)
def test_whatever_changes_a_sample_changes_its_name(adapter: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    drawn = {"draws_seed": "seed", "scheme": "scheme"}
    made = {key: value for key, value in changes.items() if key not in drawn}
    other = tiny.write_adapter(tmp_path / "other", **made)
    found = _read(other, **{drawn[key]: value for key, value in changes.items() if key in drawn})
    assert not set(found.all_names) & set(_read(adapter).all_names)


def test_what_changes_no_sample_leaves_its_name(adapter: Path, tmp_path: Path) -> None:
    assert _read(tiny.write_adapter(tmp_path / "warm", temperature=2.0)).names == _read(adapter).names


def test_a_folder_is_the_sample_and_a_part_is_sample_0_cut_down(adapter: Path, tmp_path: Path) -> None:
    loras = _read(adapter)
    whole = load_file(loras.write(tmp_path, loras.names[0]) / "adapter_model.safetensors")
    model = tiny.adapted()
    s = model.sample(model.draws(3, 0).epsilon)[0]
    layer = model.adapted["model.layers.0.self_attn.q_proj"]
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    assert whole[key.format("A")] == pytest.approx(s[: model.config.r].unsqueeze(1) * layer.lora_A)
    assert sorted(loras.parts.values()) == ["lm_head", "q_proj", "v_proj"]
    parts: dict[str, torch.Tensor] = {}
    for name, kind in loras.parts.items():
        found = load_file(loras.write(tmp_path, name) / "adapter_model.safetensors")
        assert all(f".{kind}." in each for each in found)
        parts |= found
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[each], whole[each]) for each in whole)


def test_a_folder_that_is_there_stays(adapter: Path, tmp_path: Path) -> None:
    loras = _read(adapter)
    folder = loras.write(tmp_path, loras.names[1])
    (folder / "mark").touch()
    assert loras.write(tmp_path, loras.names[1]) == folder
    assert (folder / "mark").exists()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("half a copy", "it has no adapter_model.safetensors"),
        ("cut", "it cannot be read"),
        ("another sample", "its adapter_model.safetensors has other tensors"),
        ("another alpha", "its adapter_config.json differs"),
    ],
)
def test_a_folder_of_the_same_name_with_something_else_is_refused(
    fault: str, message: str, adapter: Path, tmp_path: Path
) -> None:
    loras = _read(adapter)
    folder, other = (loras.write(tmp_path, name) for name in loras.names[:2])
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if fault == "half a copy":
        weights.unlink()
    elif fault == "cut":
        weights.write_bytes(weights.read_bytes()[:-8])
    elif fault == "another sample":
        weights.write_bytes((other / "adapter_model.safetensors").read_bytes())
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 1}))
    with pytest.raises(AdapterError, match=f"{folder} is not the LoRA of that name: {message}.*; remove that folder"):
        loras.write(tmp_path, loras.names[0])


def test_an_empty_folder_of_that_name_is_filled_and_a_renamed_base_model_changes_nothing(
    adapter: Path, tmp_path: Path
) -> None:
    loras = _read(adapter)
    (tmp_path / loras.names[0]).mkdir()
    folder = loras.write(tmp_path, loras.names[0])
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": "renamed"}))
    assert loras.write(tmp_path, loras.names[0]) == folder


def test_a_kind_that_does_nothing_is_no_part(tmp_path: Path) -> None:
    from scalabl.files.adapter_directory import save_adapter

    model = tiny.adapted()
    for name, layer in model.adapted.items():
        if name.endswith("v_proj"):
            layer.lora_B.zero_()
    save_adapter(tmp_path / "partial", model.config, dict(model.adapter_parameters()))
    assert sorted(_read(tmp_path / "partial").parts.values()) == ["lm_head", "q_proj"]
