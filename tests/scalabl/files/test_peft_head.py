"""Heads that come with the adapter: a PEFT LoRA for sequence classification converts, and answers as PEFT does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Gemma2Config

from benchmarks.random_model import SMALL, random_base
from scalabl.config import Task
from scalabl.errors import AdapterError
from scalabl.files.adapter_directory import load_adapter, read_config, read_weights, save_adapter
from scalabl.files.peft_export import export_peft
from scalabl.files.peft_head import class_names
from scalabl.files.peft_import import convert_peft, read_peft
from scalabl.files.sample_loras import SampleLoras
from scalabl.model.scalabl_model import HEAD_WEIGHT
from scalabl.model.token_batch import TokenBatch
from scalabl.prompt import Prompter
from tests import tiny
from tests.scalabl.files.peft_reference import PEFT_WARNINGS, trained_classifier

pytestmark = PEFT_WARNINGS

TEXTS = ("a rose", "the sky is wide and", "xxxxxxxxxxxxxxxxx", "b", "grass grows in the rain")
CLASSES = (0, 1, 2, 1, 0)
LABELS = ("Food, drink", "2", "e")
OWN = Task(kind="classification", template="{input}", choices=LABELS, choice_prefix="", head="own")


def _base(name: str, folder: Path) -> Path:
    """A base model's folder; Gemma 2 caps the logits of its vocabulary, which is not for another head."""
    if name != "gemma2":
        return tiny.write_base(folder, name)
    random_base(Gemma2Config(**SMALL, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=0.05)).save_pretrained(
        folder
    )
    tiny.tokenizer().save_pretrained(folder)
    return folder


def _answers(adapter: Path, base: Path, *, together: bool) -> Tensor:
    """[B, C] probabilities at the posterior mean."""
    from scalabl.base.pretrained import load_pretrained

    pretrained = load_pretrained(str(base), device="cpu")
    model = load_adapter(pretrained.model, adapter)
    prompter = Prompter(model.config.task, pretrained.tokenizer)
    sequences = [prompter.encode(text) for text in TEXTS]
    batches = [sequences] if together else [[ids] for ids in sequences]
    return torch.cat([model.logits(TokenBatch.of(batch), model.mean_draw())[:, 0] for batch in batches]).softmax(-1)


@pytest.mark.parametrize(
    ("name", "targets"),
    [("llama", ["q_proj", "v_proj"]), ("gpt2", ["c_attn", "c_proj"]), ("gemma2", "all-linear"), ("qwen2", "all-linear")],
)
def test_a_lora_with_a_classification_head_answers_as_in_peft(name: str, targets: Any, tmp_path: Path) -> None:
    base = _base(name, tmp_path / "base")
    tokenizer = tiny.tokenizer()
    settings = {"r": 4, "target_modules": targets}
    alone, padded = trained_classifier(base, tmp_path / "lora", tokenizer, TEXTS, CLASSES, **settings)
    assert (alone.max(-1).values - alone.min(-1).values).min() > 0.1  # it tells the classes apart
    skeleton = random_base(Gemma2Config(**SMALL, head_dim=8)) if name == "gemma2" else tiny.base_model(name)
    convert_peft(tmp_path / "lora", tmp_path / "new", skeleton, base_model="tiny", task=OWN, relative_std=0.1)
    assert read_config(tmp_path / "new").format_version == 2
    for together, expected in ((False, alone), (True, padded)):
        assert (_answers(tmp_path / "new", base, together=together) - expected).abs().max() <= 1e-5


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classifier")
    base = _base("llama", folder / "base")
    trained_classifier(base, folder / "lora", tiny.tokenizer(), TEXTS, CLASSES, steps=2, r=2, target_modules=["q_proj"])
    return folder / "lora"


def _converted(lora: Path, output: Path, **changes: Any) -> Path:
    task = OWN.model_copy(update=changes)
    convert_peft(lora, output, tiny.base_model(), base_model="tiny", task=task, relative_std=0.1)
    return output


def test_the_rows_of_the_head_are_stored_as_they_are(lora: Path, tmp_path: Path) -> None:
    weights = read_weights(_converted(lora, tmp_path / "new"))
    assert torch.equal(weights[HEAD_WEIGHT], load_file(lora / "adapter_model.safetensors")["base_model.model.score.weight"])
    again = load_adapter(tiny.base_model(), tmp_path / "new")
    save_adapter(tmp_path / "again", again.config, dict(again.adapter_parameters()))
    assert (tmp_path / "again" / "adapter_config.json").read_bytes() == (
        tmp_path / "new" / "adapter_config.json"
    ).read_bytes()
    assert torch.equal(read_weights(tmp_path / "again")[HEAD_WEIGHT], weights[HEAD_WEIGHT])


def test_an_adapter_without_anything_new_is_still_of_version_1(tmp_path: Path) -> None:
    content = json.loads((tiny.write_adapter(tmp_path / "old") / "adapter_config.json").read_text())
    assert (content["format_version"], "head" in content["task"]) == (1, False)


def test_names_of_classes_come_from_id2label_unless_they_say_nothing() -> None:
    assert class_names({"id2label": {"0": "no", 1: "yes"}}, 2) == ("no", "yes")
    assert class_names({"id2label": {"0": "no", "1": "yes"}}, 3) is None
    assert class_names({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}, 2) is None
    assert class_names({"id2label": {"0": "a", "1": "a"}}, 2) is None
    assert class_names({}, 2) is None


def test_names_of_classes_are_read_from_the_loras_folder(lora: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"id2label": dict(enumerate(LABELS))}))
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / file).write_bytes((lora / file).read_bytes())
    assert read_peft(tmp_path).labels == LABELS
    assert read_peft(lora).labels is None
    (tmp_path / "config.json").write_text('{"problem_type": "multi_label_classification"}')
    with pytest.raises(
        AdapterError, match="the head has 3 rows for multi_label_classification; only a head that tells two or"
    ):
        read_peft(tmp_path)


SCORE = "base_model.model.score.weight"


@pytest.mark.parametrize(
    ("tensors", "settings", "message"),
    [
        ({SCORE: torch.ones(1, 32)}, {}, "the head has 1 rows for one number; only a head that tells two or more classes"),
        ({SCORE: torch.full((3, 32), torch.nan)}, {}, "'score' has values that are not finite"),
        ({"base_model.model.score.bias": torch.ones(3)}, {}, r"must be one tensor score\.weight, .* \(found: score\.bias"),
        ({SCORE: None}, {}, r"must be one tensor score\.weight, .* \(found: none\); train with task_type SEQ_CLS"),
        ({SCORE: None, "base_model.model.classifier.weight": torch.ones(3, 32)}, {}, r"found: classifier\.weight"),
        (
            {},
            {"modules_to_save": ["score", "embed_tokens"]},
            r"modules_to_save is \['score', 'embed_tokens'\], which cannot be",
        ),
        ({SCORE: torch.ones(3, 16)}, {}, r"the head 'score' of the LoRA is \[3, 16\]; .* need \[3, 32\]"),
        ({SCORE: torch.ones(4, 32)}, {}, r"the head 'score' of the LoRA is \[4, 32\]; .* name each class with --label"),
    ],
)
def test_a_head_that_cannot_be_taken_is_refused_by_name(
    tensors: dict[str, Tensor | None], settings: dict[str, Any], message: str, lora: Path, tmp_path: Path
) -> None:
    content = load_file(lora / "adapter_model.safetensors") | tensors
    save_file({key: value for key, value in content.items() if value is not None}, tmp_path / "adapter_model.safetensors")
    config = json.loads((lora / "adapter_config.json").read_text()) | settings
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match=message):
        _converted(tmp_path, tmp_path / "new")


def test_what_a_lora_for_generation_cannot_carry_is_refused(lora: Path, tmp_path: Path) -> None:
    _converted(lora, tmp_path / "new")
    with pytest.raises(AdapterError, match=r"new has a head of its own .*, which a LoRA for text generation cannot carry"):
        export_peft(tmp_path / "new", tmp_path / "out", tiny.base_model(), num_samples=2)
    with pytest.raises(AdapterError, match="serve it with --engine transformers"):
        SampleLoras.read(tmp_path / "new", tiny.base_model(), num_samples=2, seed=0, scheme="sobol")


def test_a_head_and_tokens_for_its_choices_exclude_each_other() -> None:
    for changes in ({"choice_tokens": (1, 2, 3)}, {"kind": "multiple_choice", "template": "{input}{choices}"}):
        with pytest.raises(ValueError, match="head is 'own', which is for classification without choice_tokens"):
            Task.model_validate({**OWN.model_dump(), **changes})


def test_an_adapter_without_its_head_is_refused(lora: Path, tmp_path: Path) -> None:
    _converted(lora, tmp_path / "new")
    weights = read_weights(tmp_path / "new")
    del weights[HEAD_WEIGHT]
    save_file(weights, tmp_path / "new" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"tensor 'head\.weight' is missing"):
        load_adapter(tiny.base_model(), tmp_path / "new")
