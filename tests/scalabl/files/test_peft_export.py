"""PEFT reads what was exported, and its logits with each sample are ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from scalabl.errors import AdapterError
from scalabl.files.adapter_directory import load_adapter
from scalabl.files.peft_export import EXPORT_FILE, export_peft
from scalabl.model.token_batch import TokenBatch
from scalabl.prompt import Prompter
from tests import tiny
from tests.scalabl.files.peft_reference import PEFT_WARNINGS, TOKENS, PeftModel, peft_logits

pytestmark = PEFT_WARNINGS


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {}),  # tied embeddings
        ("qwen2", {}),  # untied, with biases
        ("gpt2", {}),  # Conv1D and tied embeddings
        ("phi3", {"layers_to_transform": (1,)}),
        ("llama", {"target_modules": ("q_proj",), "posterior_scale": 0.5}),  # without the head
        ("llama", tiny.MIXTURE | {"posterior_scale": 0.5}),
    ],
)
def test_peft_with_each_exported_sample_gives_our_logits(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    tiny.write_adapter(tmp_path / "ours", name, **changes)
    names = export_peft(tmp_path / "ours", tmp_path / "out", tiny.base_model(name), num_samples=3, seed=5)
    ours = load_adapter(tiny.base_model(name), tmp_path / "ours")
    sequences = tiny.ragged()
    expected = ours.logits(TokenBatch.of(sequences), ours.draws(3, seed=5))  # [B, K, C]
    assert names == ["sample-0", "sample-1", "sample-2"]
    for k, sample in enumerate(names):
        theirs = PeftModel.from_pretrained(tiny.base_model(name), str(tmp_path / "out" / sample)).eval()
        assert (peft_logits(theirs, sequences) - expected[:, k]).abs().max() <= 1e-5
    assert (expected[:, 0] - expected[:, 1]).abs().max() > 1e-2, "the samples differ"


def test_the_samples_differ_in_lora_a_only_and_the_heads_other_tokens_are_the_base_models(tmp_path: Path) -> None:
    tiny.write_adapter(tmp_path / "ours", temperature=1.5)
    export_peft(tmp_path / "ours", tmp_path / "out", tiny.base_model(), num_samples=12)
    note = json.loads((tmp_path / "out" / EXPORT_FILE).read_text())
    assert (note["temperature"], note["samples"][0], note["samples"][-1]) == (1.5, "sample-00", "sample-11")
    assert note["task"]["choice_tokens"] == list(TOKENS)
    first, last = (load_file(tmp_path / "out" / name / "adapter_model.safetensors") for name in ("sample-00", "sample-11"))
    assert all(torch.equal(first[key], last[key]) == ("lora_B" in key) for key in first)
    head = first["base_model.model.lm_head.lora_B.weight"]
    assert head.shape[0] == tiny.VOCABULARY
    assert head.any(1).nonzero()[:, 0].tolist() == sorted(TOKENS)


def test_choices_with_assigned_tokens_are_exported_with_them(tmp_path: Path) -> None:
    labels = ("card_arrival", "card_linking", "card", "0", "00", "000")  # the last two have spare tokens
    task = Prompter(tiny.CLASSIFICATION.model_copy(update={"choices": labels}), tiny.tokenizer()).resolved_task
    assert task.choice_tokens is not None
    tiny.write_adapter(tmp_path / "ours", task=task)
    (name,) = export_peft(tmp_path / "ours", tmp_path / "out", tiny.base_model(), num_samples=1)
    ours = load_adapter(tiny.base_model(), tmp_path / "ours")
    expected = ours.logits(TokenBatch.of(tiny.ragged()), ours.draws(1))[:, 0]
    theirs = PeftModel.from_pretrained(tiny.base_model(), str(tmp_path / "out" / name)).eval()
    assert (peft_logits(theirs, tiny.ragged(), task.choice_tokens) - expected).abs().max() <= 1e-5


def test_export_needs_no_weights_of_the_base_model_and_never_overwrites(tmp_path: Path) -> None:
    tiny.write_adapter(tmp_path / "ours")
    with torch.device("meta"):
        skeleton = type(tiny.base_model())(tiny.ARCHITECTURES["llama"][0])
    export_peft(tmp_path / "ours", tmp_path / "lean", skeleton, num_samples=1)
    export_peft(tmp_path / "ours", tmp_path / "full", tiny.base_model(), num_samples=1)
    lean, full = (load_file(tmp_path / each / "sample-0" / "adapter_model.safetensors") for each in ("lean", "full"))
    assert all(torch.equal(lean[key], full[key]) for key in full)
    with pytest.raises(AdapterError, match="lean already exists; choose a new folder"):
        export_peft(tmp_path / "ours", tmp_path / "lean", tiny.base_model(), num_samples=1)
