"""PEFT wrote what is converted, and its logits are those of the mean of the adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from scalabl.config import Task
from scalabl.errors import AdapterError
from scalabl.files.adapter_directory import load_adapter, read_weights
from scalabl.files.peft_export import export_peft
from scalabl.files.peft_import import convert_peft, relative_log_std, subspace_of
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.model.token_batch import TokenBatch
from scalabl.prompt import Prompter
from tests import tiny
from tests.scalabl.files.peft_reference import PEFT_WARNINGS, LoraConfig, get_peft_model, peft_logits

pytestmark = PEFT_WARNINGS


def _trained(name: str, folder: Path, *, zero: str | None = None, **settings: Any) -> tuple[Path, Tensor]:
    """A LoRA with random values that PEFT saved, and PEFT's own logits with it."""
    base = tiny.base_model(name)
    model = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | settings)).eval()
    generator = torch.Generator().manual_seed(3)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
            if zero is not None and zero in key:
                parameter.data[..., :1] = 0.0
                parameter.data[..., 1] = parameter.data[..., 2]  # a repeated column of B: rank 2 of 4
    model.save_pretrained(folder)
    return folder, peft_logits(model, tiny.ragged())


def _converted(folder: Path, output: Path, name: str, task: Task = tiny.CLASSIFICATION) -> ScalaBLModel:
    resolved = Prompter(task, tiny.tokenizer()).resolved_task
    convert_peft(folder, output, tiny.base_model(name), base_model=f"tiny-{name}", task=resolved, relative_std=0.1)
    return load_adapter(tiny.base_model(name), output)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llama", {"target_modules": ["q_proj", "v_proj"]}),
        ("llama", {"target_modules": ["q_proj", "lm_head"]}),  # saved with a copy of the tied head
        ("qwen2", {"target_modules": ["q_proj", "v_proj", "lm_head"], "use_rslora": True}),
        ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
        ("llama", {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}),
        ("llama", {"target_modules": r".*\.(0\.self_attn\.q_proj|1\.self_attn\.v_proj)"}),
        (
            "mistral",
            {
                "target_modules": ["q_proj", "k_proj"],
                "rank_pattern": {"layers.0.self_attn.q_proj": 2, "k_proj": 7},
                "alpha_pattern": {"layers.1.self_attn.q_proj": 11},
                "use_rslora": True,
            },
        ),
        ("llama", {"target_modules": ["q_proj", "v_proj"], "zero": "lora_B"}),
        ("llama", {"target_modules": ["v_proj", "lm_head"], "r": 24}),  # more than v_proj has outputs, or the task choices
    ],
)
def test_the_mean_of_a_converted_lora_gives_pefts_logits(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    folder, expected = _trained(name, tmp_path / "theirs", **settings)
    ours = _converted(folder, tmp_path / "ours", name)
    logits = ours.logits(TokenBatch.of(tiny.ragged()), ours.mean_draw())[:, 0]
    assert (logits - expected).abs().max() <= 1e-5


def test_a_converted_adapter_has_orthonormal_directions_and_a_share_of_each_mean_as_spread(tmp_path: Path) -> None:
    folder, _ = _trained("llama", tmp_path / "theirs", target_modules=["q_proj"], zero="lora_B")
    ours = _converted(folder, tmp_path / "ours", "llama")
    weights = read_weights(tmp_path / "ours")
    for module in ours.adapted:
        rows, mean = weights[f"{module}.lora_A"], weights[f"{module}.s_mean"]
        assert torch.allclose(rows @ rows.T, torch.eye(4), atol=1e-5)
        assert mean.tolist() == sorted(mean.tolist(), reverse=True)
        assert (mean > 0).tolist() == [True, True, False, False]
        spread = weights[f"{module}.s_log_std"].exp()
        assert torch.allclose(spread[:2], 0.1 * mean[:2])
        assert torch.allclose(spread[2:], 0.1 * mean[1:2].expand(2))
        assert not weights[f"{module}.lora_B"][:, 2:].any(), "what has no mean has no effect, whatever is drawn"


@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 9), st.integers(0, 6), st.integers(0, 2**31))
def test_the_thin_svd_is_exact_for_any_shape_and_rank(r: int, d_in: int, d_out: int, deficient: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(r, d_in, generator=generator, dtype=torch.float64)
    up = torch.randn(d_out, r, generator=generator, dtype=torch.float64)
    up[:, :deficient] = 0
    rows, mean, columns = subspace_of(down, up, r + 2)
    assert torch.allclose((columns * mean) @ rows, up @ down, atol=1e-10)
    assert int((mean > 0).sum()) <= min(max(0, r - deficient), d_in, d_out)
    assert torch.equal(columns[:, mean == 0], torch.zeros(d_out, int((mean == 0).sum()), dtype=torch.float64))


def test_a_module_without_any_mean_still_has_a_spread() -> None:
    assert relative_log_std(torch.zeros(3), 0.1).exp().tolist() == pytest.approx([0.1] * 3)


def _changed(folder: Path, target: Path, **changes: Any) -> Path:
    target.mkdir()
    config = json.loads((folder / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps(config | changes))
    (target / "adapter_model.safetensors").write_bytes((folder / "adapter_model.safetensors").read_bytes())
    return target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora is True, which cannot be converted"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"modules_to_save": ["classifier"]}, r"modules_to_save is \['classifier'\]"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"peft_type": "LOHA"}, "peft_type must be 'LORA'"),
        ({"alpha_pattern": {"(": 3}}, "lora_alpha must be a number, and alpha_pattern must map"),
        ({"lora_alpha": "many"}, "lora_alpha must be a number, and alpha_pattern must map"),
    ],
)
def test_what_a_low_rank_product_cannot_hold_is_refused_by_name(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder, _ = _trained("llama", tmp_path / "theirs", target_modules=["q_proj"])
    with pytest.raises(AdapterError, match=message):
        _converted(_changed(folder, tmp_path / "changed", **changes), tmp_path / "ours", "llama")
    assert not (tmp_path / "ours").exists()


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{Q}.lora_magnitude_vector": torch.ones(4)}, "lora_magnitude_vector' is not the lora_A or lora_B"),
        ({f"{Q}.lora_B.weight": torch.ones(32, 3)}, "lora_A and lora_B of 'model.layers.0.self_attn.q_proj' must both"),
        ({f"{Q}.lora_A.weight": torch.full((4, 32), torch.nan)}, "has values that are not finite"),
        ({f"{Q}.lora_A.weight": torch.ones(4, 16)}, "maps 16 to 32 features; that layer of the base model maps 32 to 32"),
        ({f"{Q}x.lora_A.weight": torch.ones(4, 32)}, "lora_A and lora_B of 'model.layers.0.self_attn.q_projx' must"),
        (
            {f"{Q}x.lora_A.weight": torch.ones(4, 32), f"{Q}x.lora_B.weight": torch.ones(32, 4)},
            "adapts 'model.layers.0.self_attn.q_projx', which the base model LlamaForCausalLM does not have",
        ),
        (
            {"base_model.model.lm_head.base_layer.weight": torch.ones(300, 32)},
            "'lm_head' of 300 rows, which is not the base",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(changes: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    folder, _ = _trained("llama", tmp_path / "theirs", target_modules=["q_proj"])
    tensors = load_file(folder / "adapter_model.safetensors") | changes
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=message):
        _converted(folder, tmp_path / "ours", "llama")


def test_a_lora_that_does_nothing_is_refused(tmp_path: Path) -> None:
    model = get_peft_model(tiny.base_model(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "theirs")
    with pytest.raises(AdapterError, match="the LoRA has no effect"):
        _converted(tmp_path / "theirs", tmp_path / "ours", "llama")


def test_an_exported_sample_converts_back_to_its_own_logits(tmp_path: Path) -> None:
    tiny.write_adapter(tmp_path / "ours")
    export_peft(tmp_path / "ours", tmp_path / "out", tiny.base_model(), num_samples=2)
    back = _converted(tmp_path / "out" / "sample-1", tmp_path / "back", "llama")
    ours = load_adapter(tiny.base_model(), tmp_path / "ours")
    batch = TokenBatch.of(tiny.ragged())
    expected = ours.logits(batch, ours.draws(2))[:, 1]
    assert (back.logits(batch, back.mean_draw())[:, 0] - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("missing", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(missing: str, tmp_path: Path) -> None:
    folder, _ = _trained("llama", tmp_path / "theirs", target_modules=["q_proj"])
    (folder / missing).unlink()
    with pytest.raises(AdapterError, match=rf"{missing} does not exist"):
        _converted(folder, tmp_path / "ours", "llama")


def _skeleton(name: str) -> PreTrainedModel:
    with torch.device("meta"):
        return type(tiny.base_model(name))(tiny.ARCHITECTURES[name][0])


def test_conversion_needs_no_weights_of_the_base_model(tmp_path: Path) -> None:
    folder, _ = _trained("llama", tmp_path / "theirs", target_modules=["q_proj", "lm_head"])
    task = Prompter(tiny.CLASSIFICATION, tiny.tokenizer()).resolved_task
    for output, base in (("lean", _skeleton("llama")), ("full", tiny.base_model())):
        convert_peft(folder, tmp_path / output, base, base_model="tiny", task=task, relative_std=0.1)
    lean, full = read_weights(tmp_path / "lean"), read_weights(tmp_path / "full")
    assert all(torch.equal(lean[key], full[key]) for key in full)
