"""Names, patterns and `all-linear` choose the modules that PEFT chooses, and of a multimodal model its language tower's."""

from __future__ import annotations

import functools
import re

import pytest
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from scalabl.base.targets import is_adaptable, is_pattern, select, targets_of
from scalabl.errors import AdapterError
from tests import tiny
from tests.architectures.tiny_types import tiny_config, tiny_model
from tests.scalabl.files.peft_reference import PEFT_WARNINGS, LoraConfig, get_peft_model

pytestmark = PEFT_WARNINGS


def test_what_can_be_adapted() -> None:
    assert is_adaptable(nn.Linear(2, 3))
    assert is_adaptable(Conv1D(3, 2))
    assert not is_adaptable(nn.Embedding(2, 3))
    assert not is_adaptable(nn.LayerNorm(3))


@functools.cache
def _base(name: str) -> PreTrainedModel:
    return tiny_model(tiny_config(name))


def _chosen(name: str, targets: str | tuple[str, ...]) -> list[str]:
    """The modules that an adapter with these targets adapts."""
    base = _base(name)
    config = tiny.config_for("llama").model_copy(update={"target_modules": targets_of(base, targets)})
    return select(dict(base.named_modules()), "lm_head", config, "Tiny")


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", "all-linear"),
        ("gpt2", "All-Linear"),
        ("opt", "all-linear"),
        ("qwen2_moe", "all-linear"),
        ("llama", r".*\.(q|v)_proj"),
        ("llama", r"model\.layers\.1\..*_proj"),
        ("llama", r".*self_attn\.[qk]_proj|lm_head"),
        ("llama", ("q_proj", "0.mlp.up_proj")),
    ],
)
def test_the_modules_are_those_that_peft_chooses(name: str, targets: str | tuple[str, ...]) -> None:
    chosen = _chosen(name, targets)
    wanted = targets if isinstance(targets, str) else list(targets)
    peft = get_peft_model(
        tiny_model(_base(name).config), LoraConfig(target_modules=wanted, fan_in_fan_out=name == "gpt2", r=1)
    )
    assert set(chosen) == set(peft.base_model.targeted_module_names)
    assert chosen


def test_a_list_of_names_stays_as_it_is() -> None:
    assert targets_of(_base("llama"), ("q_proj", "v_proj", "lm_head")) == ("q_proj", "v_proj", "lm_head")
    assert [is_pattern(text) for text in ("q_proj, v_proj", "layers.0.q_proj", "all-linear", ".*q_proj", "q|v")] == [
        False, False, True, True, True,
    ]  # fmt: skip


def test_only_the_language_tower_of_a_multimodal_model_is_adapted() -> None:
    towers = {name for name, module in _base("gemma3").named_modules() if is_adaptable(module) and "vision" in name}
    assert any(name.endswith("q_proj") for name in towers)
    for targets in ("all-linear", ("q_proj", "v_proj", "lm_head"), r".*\.q_proj"):
        chosen = _chosen("gemma3", targets)
        assert "model.language_model.layers.0.self_attn.q_proj" in chosen
        assert not towers & set(chosen)
    with pytest.raises(AdapterError, match=r"'fc1' is not a linear layer of the part of Gemma3.* that reads text"):
        targets_of(_base("gemma3"), ("q_proj", "fc1"))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("q_proj|v_proj", "must match the whole name of a layer, such as 'model.layers.0.self_attn.q_proj'"),
        ("(q_proj", "'(q_proj' is not a valid regular expression: missing )"),
    ],
)
def test_a_pattern_that_matches_nothing_or_is_not_valid_is_refused(targets: str, message: str) -> None:
    with pytest.raises(AdapterError, match=re.escape(message)):
        targets_of(_base("llama"), targets)
