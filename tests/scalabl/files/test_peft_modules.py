"""LoRAs of `all-linear`, of another class of the same architecture, and of modules that cannot be served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from scalabl.errors import AdapterError
from scalabl.files.adapter_directory import load_adapter, read_config
from scalabl.files.peft_import import convert_peft
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.model.token_batch import TokenBatch
from tests import tiny
from tests.architectures.tiny_types import VOCABULARY, tiny_config, tiny_model
from tests.scalabl.files.peft_reference import PEFT_WARNINGS, LoraConfig, get_peft_model

pytestmark = PEFT_WARNINGS

TOKENS = (5, 17, 40)
TASK = tiny.CLASSIFICATION.model_copy(update={"choice_tokens": TOKENS})
SEQUENCES = [[3 + (7 * i + n) % (VOCABULARY - 3) for i in range(n)] for n in (3, 9, 1, 14)]


def _lora(base: PreTrainedModel, folder: Path, **settings: Any) -> Tensor:
    """A LoRA with random values that PEFT saved, and PEFT's own logits with it, one input at a time."""
    model = get_peft_model(base, LoraConfig(**{"r": 4, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | settings)).eval()
    generator = torch.Generator().manual_seed(3)
    for key, parameter in model.named_parameters():
        if "lora_" in key:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    with torch.inference_mode():
        rows = [model(input_ids=torch.tensor([ids])).logits[0, -1, list(TOKENS)] for ids in SEQUENCES]
    return torch.stack(rows)


def _skeleton(kind: str) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(kind))


def _converted(folder: Path, output: Path, kind: str) -> ScalaBLModel:
    convert_peft(folder, output, _skeleton(kind), base_model="tiny", task=TASK, relative_std=0.1)
    return load_adapter(tiny_model(tiny_config(kind)), output)


def _mean_logits(model: ScalaBLModel) -> Tensor:
    return model.logits(TokenBatch.of(SEQUENCES), model.mean_draw())[:, 0]


@pytest.mark.parametrize("kind", ["opt", "qwen2_moe"])
def test_a_lora_of_all_linear_layers_gives_pefts_logits(kind: str, tmp_path: Path) -> None:
    expected = _lora(tiny_model(tiny_config(kind)), tmp_path / "theirs", target_modules="all-linear")
    ours = _converted(tmp_path / "theirs", tmp_path / "ours", kind)
    assert (_mean_logits(ours) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"]])
def test_a_lora_of_the_class_for_text_alone_fits_the_multimodal_class(targets: Any, tmp_path: Path) -> None:
    whole = tiny_model(tiny_config("gemma3"))
    text = AutoModelForCausalLM.from_config(whole.config.get_text_config(), dtype=torch.float32).eval()
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.tie_weights()
    expected = _lora(text, tmp_path / "theirs", target_modules=targets)
    ours = _converted(tmp_path / "theirs", tmp_path / "ours", "gemma3")
    assert (_mean_logits(ours) - expected).abs().max() <= 1e-5
    assert all(name == "lm_head" or name.startswith("model.language_model.layers.") for name in ours.adapted)


def test_parts_of_a_lora_that_no_text_reaches_are_left_out_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = _lora(tiny_model(tiny_config("gemma3")), tmp_path / "theirs", target_modules=["q_proj"])
    ours = _converted(tmp_path / "theirs", tmp_path / "ours", "gemma3")
    assert (_mean_logits(ours) - expected).abs().max() <= 1e-5
    assert not any("vision" in name for name in ours.adapted)
    said = [record.getMessage() for record in caplog.records if record.name == "scalabl"]
    assert len(said) == 1
    assert "modules of the LoRA are left out, because no text reaches them, first 'model.vision_tower." in said[0]


def test_a_lora_of_layers_whose_weights_are_read_directly_is_refused_by_convert(tmp_path: Path) -> None:
    _lora(tiny_model(tiny_config("mamba")), tmp_path / "theirs", target_modules=["in_proj", "dt_proj"])
    with pytest.raises(AdapterError, match=r"'backbone.layers.0.mixer.dt_proj' .* is not called as a layer"):
        _converted(tmp_path / "theirs", tmp_path / "ours", "mamba")
    assert not (tmp_path / "ours").exists()


def test_a_lora_on_mamba_gives_pefts_logits(tmp_path: Path) -> None:
    targets = ["in_proj", "x_proj"]
    expected = _lora(tiny_model(tiny_config("mamba")), tmp_path / "theirs", target_modules=targets)
    assert (_mean_logits(_converted(tmp_path / "theirs", tmp_path / "ours", "mamba")) - expected).abs().max() <= 1e-5
    assert set(read_config(tmp_path / "ours").target_modules) == set(targets)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"target_parameters": ["mlp.experts.gate_up_proj"]},
            r"target_parameters is \['mlp.experts.gate_up_proj'\], which .* because it is a LoRA of routed experts",
        ),
        (
            {"modules_to_save": ["embed_tokens"]},
            r"modules_to_save is \['embed_tokens'\], .* because it stands for trained copies of whole modules",
        ),
    ],
)
def test_what_cannot_be_exact_is_refused_with_its_reason(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    _lora(tiny_model(tiny_config("mixtral")), tmp_path / "theirs", target_modules=["q_proj"])
    path = tmp_path / "theirs" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(AdapterError, match=message):
        _converted(tmp_path / "theirs", tmp_path / "ours", "mixtral")


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match")
def test_all_linear_layers_of_a_mixture_of_experts_are_refused_where_peft_adapts_the_experts(tmp_path: Path) -> None:
    _lora(tiny_model(tiny_config("mixtral")), tmp_path / "theirs", target_modules="all-linear")
    with pytest.raises(AdapterError, match=r"target_parameters is \[.*because it is a LoRA of routed experts"):
        _converted(tmp_path / "theirs", tmp_path / "ours", "mixtral")


def test_a_lora_of_experts_that_were_layers_of_their_own_is_refused_by_name(tmp_path: Path) -> None:
    _lora(tiny_model(tiny_config("mixtral")), tmp_path / "theirs", target_modules=["q_proj"])
    path = tmp_path / "theirs" / "adapter_model.safetensors"
    expert = "base_model.model.model.layers.0.block_sparse_moe.experts.0.w1"
    parts = {f"{expert}.lora_A.weight": torch.ones(4, 32), f"{expert}.lora_B.weight": torch.ones(64, 4)}
    save_file(load_file(path) | parts, path)
    with pytest.raises(AdapterError, match=r"adapts 'model.layers.0.block_sparse_moe.experts.0.w1', a routed expert"):
        _converted(tmp_path / "theirs", tmp_path / "ours", "mixtral")
