"""Adapter directories: what is written comes back, and what cannot be served is refused by name."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from scalabl.errors import AdapterError
from scalabl.files.adapter_directory import load_adapter, load_weights, read_config, read_weights, save_adapter
from scalabl.model.token_batch import TokenBatch
from scalabl.passes.probes import find_shared_work
from tests import tiny

Q_PROJ = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return tiny.write_adapter(tmp_path / "adapter")


def _edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _edit_weights(folder: Path, **changes: Tensor | None) -> None:
    """`None` removes a tensor."""
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)


def _refused(folder: Path, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        load_adapter(tiny.base_model(), folder)


def test_a_saved_adapter_loads_to_the_same_logits(adapter: Path) -> None:
    batch = TokenBatch.of(tiny.ragged())
    written, loaded = tiny.adapted(), load_adapter(tiny.base_model(), adapter)
    find_shared_work(written)  # as loading does: to the last bit the same passes
    assert torch.equal(loaded.logits(batch, loaded.draws(6)), written.logits(batch, written.draws(6)))


def test_names_and_files_are_the_ones_of_the_contract(adapter: Path) -> None:
    assert sorted(os.listdir(adapter)) == ["adapter_config.json", "adapter_model.safetensors"]
    shapes = {name: list(tensor.shape) for name, tensor in read_weights(adapter).items()}
    assert shapes[f"{Q_PROJ}.lora_A"] == [4, 32]
    assert shapes[f"{Q_PROJ}.lora_B"] == [32, 4]
    assert shapes[f"{Q_PROJ}.s_mean"] == shapes[f"{Q_PROJ}.s_log_std"] == [4]
    assert shapes["lm_head.lora_B"] == [3, 4], "one row for each choice"
    assert json.loads((adapter / "adapter_config.json").read_text())["peft_type"] == "SCALABL"


def test_whoever_may_read_one_file_may_read_both(adapter: Path) -> None:
    """A server in a container is another user than the one who trained."""
    modes = {path.name: path.stat().st_mode & 0o777 for path in adapter.iterdir()}
    assert modes["adapter_model.safetensors"] == modes["adapter_config.json"]


def test_an_adapter_serves_in_the_base_models_dtype(adapter: Path) -> None:
    model = load_adapter(tiny.base_model().to(torch.bfloat16), adapter)
    assert {name.rpartition(".")[2]: p.dtype for name, p in model.adapter_parameters().items()} == {
        "lora_A": torch.bfloat16,
        "lora_B": torch.bfloat16,
        "s_mean": torch.float32,
        "s_log_std": torch.float32,
    }
    assert model.logits(TokenBatch.of(tiny.ragged()), model.draws(3)).dtype == torch.float32


def test_saving_over_an_adapter_replaces_it_whole(adapter: Path) -> None:
    model = tiny.adapted(seed=1)
    save_adapter(adapter, model.config, dict(model.adapter_parameters()))
    assert torch.equal(read_weights(adapter)[f"{Q_PROJ}.lora_A"], model.adapter_parameters()[f"{Q_PROJ}.lora_A"])
    assert sorted(os.listdir(adapter)) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_module_that_the_base_model_lacks_is_named(adapter: Path) -> None:
    _edit_config(adapter, target_modules=["q_proj", "v_proj", "w_pack", "lm_head"])
    _refused(adapter, "target module 'w_pack' matches no linear layer of the base model LlamaForCausalLM")


def test_a_layer_that_the_base_model_lacks_is_named(adapter: Path) -> None:
    _edit_config(adapter, layers_to_transform=[0, 7])
    _refused(adapter, "layers_to_transform names layer 7")


def test_a_missing_tensor_is_named(adapter: Path) -> None:
    _edit_weights(adapter, **{f"{Q_PROJ}.s_mean": None})
    _refused(adapter, rf"tensor '{Q_PROJ}\.s_mean' is missing from adapter_model\.safetensors")


def test_a_surplus_tensor_is_named_with_its_module(adapter: Path) -> None:
    _edit_weights(adapter, **{"model.layers.9.self_attn.q_proj.lora_A": torch.zeros(4, 32)})
    _refused(adapter, r"'model\.layers\.9\.self_attn\.q_proj' is not a module of the base model that")


def test_a_wrong_shape_is_named_with_the_one_expected(adapter: Path) -> None:
    _edit_weights(adapter, **{f"{Q_PROJ}.lora_A": torch.zeros(4, 31)})
    _refused(adapter, rf"'{Q_PROJ}\.lora_A' has shape \[4, 31\]; the base model and adapter_config\.json require \[4, 32\]")


def test_another_rank_in_the_config_is_a_wrong_shape(adapter: Path) -> None:
    _edit_config(adapter, r=5)
    _refused(adapter, r"has shape \[4\]; the base model and adapter_config\.json require \[5\]")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", ["lora_A", "lora_B", "s_mean"])
def test_values_that_are_not_finite_are_refused(adapter: Path, kind: str, value: float) -> None:
    name = f"{Q_PROJ}.{kind}"
    tensor = read_weights(adapter)[name]
    tensor.view(-1)[1] = value
    _edit_weights(adapter, **{name: tensor})
    _refused(adapter, rf"tensor '{Q_PROJ}\.{kind}' has values that are not finite")


@pytest.mark.parametrize(
    ("log_std", "message"),
    [(-math.inf, "sigma that is not above 0"), (-200.0, "sigma that is not above 0"),
     (math.inf, "sigma that is not finite"), (200.0, "sigma that is not finite"), (math.nan, "not finite")],
)  # fmt: skip
def test_a_sigma_that_is_no_standard_deviation_is_refused(adapter: Path, log_std: float, message: str) -> None:
    _edit_weights(adapter, **{f"{Q_PROJ}.s_log_std": torch.tensor([0.0, log_std, 0.0, 0.0])})
    _refused(adapter, rf"tensor '{Q_PROJ}\.s_log_std' has .*{message}")


def test_choices_with_one_token_are_named(adapter: Path) -> None:
    task = json.loads((adapter / "adapter_config.json").read_text())["task"]
    _edit_config(adapter, task=task | {"choice_tokens": [85, 74, 85]})
    _refused(adapter, "choices 'red' and 'blue' share the token 85; rename one of them")


def test_a_choice_token_outside_the_vocabulary_is_named(adapter: Path) -> None:
    task = json.loads((adapter / "adapter_config.json").read_text())["task"]
    _edit_config(adapter, task=task | {"choice_tokens": [85, 74, 5000]})
    _refused(adapter, "choice token 5000 is outside the base model's vocabulary of 259")


def test_an_adapter_that_was_never_trained_is_refused(adapter: Path) -> None:
    weights = {n: torch.zeros_like(t) for n, t in read_weights(adapter).items() if n.endswith("lora_B")}
    _edit_weights(adapter, **weights)
    _refused(adapter, "the adapter changes no logit of the base model")


def test_a_mixture_keeps_its_logits_and_one_member_has_the_first_version(adapter: Path, tmp_path: Path) -> None:
    tiny.write_adapter(tmp_path / "mixture", **tiny.MIXTURE)
    model = load_adapter(tiny.base_model(), tmp_path / "mixture")
    batch = TokenBatch.of(tiny.ragged())
    assert torch.allclose(model.logits(batch, model.draws(6)), tiny.mixture().logits(batch, model.draws(6)), atol=1e-5)
    written, single = (
        json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path / "mixture", adapter)
    )
    assert (written["format_version"], written["members"]) == (2, 3)
    assert single["format_version"] == 1
    assert "members" not in single
    tensor = read_weights(tmp_path / "mixture")["lm_head.lora_B"]
    assert tensor.shape == (3, 3, 4)  # members, choices, rank


def test_a_mixture_with_another_number_of_members_than_its_tensors_is_refused(tmp_path: Path) -> None:
    folder = tiny.write_adapter(tmp_path / "mixture", **tiny.MIXTURE)
    _edit_config(folder, members=2)
    _refused(folder, r"s_mean' has shape \[3, 4\]; the base model and adapter_config\.json require \[2, 4\]")
    _edit_config(folder, members=1, format_version=1)
    _refused(folder, r"s_mean' has shape \[3, 4\]; the base model and adapter_config\.json require \[4\]")


def test_a_mixture_with_an_untrained_member_is_refused(tmp_path: Path) -> None:
    folder = tiny.write_adapter(tmp_path / "mixture", **tiny.MIXTURE)
    weights = {n: t for n, t in read_weights(folder).items() if n.endswith("lora_B")}
    for tensor in weights.values():
        tensor[1] = 0
    _edit_weights(folder, **weights)
    _refused(folder, "member 2 of the adapter's 3 changes no logit of the base model")


def test_a_refused_adapter_leaves_nothing_half_loaded(adapter: Path) -> None:
    model = tiny.adapted()
    before = {name: parameter.clone() for name, parameter in model.adapter_parameters().items()}
    weights = {name: torch.ones_like(parameter) for name, parameter in before.items()}
    last = list(weights)[-1]
    weights[last] = torch.full_like(weights[last], math.nan)
    with pytest.raises(AdapterError, match="not finite"):
        load_weights(model, weights)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.adapter_parameters().items())


def test_missing_files_are_named(tmp_path: Path, adapter: Path) -> None:
    with pytest.raises(AdapterError, match=r"nowhere has no adapter_config\.json; an adapter folder needs it and"):
        read_config(tmp_path / "nowhere")
    (adapter / "adapter_model.safetensors").unlink()
    _refused(adapter, r"has no adapter_model\.safetensors")


def test_files_that_are_something_else_are_refused(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").write_bytes(b"PK\x03\x04 a pickle in a zip")
    _refused(adapter, "is not a safetensors file")
    (adapter / "adapter_config.json").write_text("{")
    _refused(adapter, r"adapter_config\.json cannot be read as JSON")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LORA"}, "peft_type is 'LORA'; a ScalaBL adapter has 'SCALABL'"),
        ({"format_version": 3}, "format_version: .*format_version 3 is not supported; this release reads versions 1 and 2"),
        ({"members": 2}, "members is 2, which needs format_version 2"),
        ({"members": 0}, "members: Input should be greater than or equal to 1"),
        ({"covariance": "full"}, "covariance is full, which needs format_version 2"),
        ({"r": 0}, "r: Input should be greater than or equal to 1"),
        ({"temperature": 0}, "temperature: Input should be greater than 0"),
        ({"posterior_scale": -1}, "posterior_scale: Input should be greater than or equal to 0"),
        ({"prior_std": 0}, "prior_std: Input should be greater than 0"),
        ({"target_modules": []}, "target_modules: Tuple should have at least 1 item"),
        ({"rank": 8}, "rank: Extra inputs are not permitted"),
        ({"task": {}}, "task.kind: Field required"),
    ],
)
def test_a_wrong_field_of_the_config_is_named(adapter: Path, changes: dict[str, Any], message: str) -> None:
    _edit_config(adapter, **changes)
    with pytest.raises(AdapterError, match=message):
        read_config(adapter)
