"""The sizing page's tables are those that its command prints, and its formulas give what is known of the models."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, Qwen2Config

from benchmarks import sizing

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "table", [sizing.memory, sizing.throughput, sizing.balance, sizing.overhead], ids=lambda f: f.__name__
)
def test_the_page_has_the_tables_that_the_command_prints(table: object) -> None:
    assert callable(table)
    assert table() in PAGE


@pytest.mark.parametrize("base", sizing.BASES, ids=lambda base: base.name)
def test_parameters_are_those_of_the_model(base: sizing.Base) -> None:
    import torch

    config = Qwen2Config(
        vocab_size=base.vocabulary,
        hidden_size=base.hidden,
        intermediate_size=base.intermediate,
        num_hidden_layers=base.layers,
        num_attention_heads=base.heads,
        num_key_value_heads=base.kv_heads,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    counted = sum(parameter.numel() for parameter in model.parameters())
    assert base.parameters == pytest.approx(counted, rel=1e-3)  # which has norms and biases too
    assert f"{counted / 1e9:.1f} B" in PAGE


def test_a_slot_is_one_lora() -> None:
    base = sizing.Base("tiny", layers=2, hidden=6, heads=2, kv_heads=1, head_dim=3, intermediate=7, vocabulary=11)
    q, v, head = 6 + 6, 6 + 3, 6 + 11
    assert base.slot(("q_proj", "v_proj")) == 2 * 8 * (2 * (q + v) + head)
