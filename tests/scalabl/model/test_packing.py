"""Passes without padding: where tokens lie, and that no number changes whatever the architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import BloomConfig, BloomForCausalLM

from scalabl.base import transfer
from scalabl.model import packing
from scalabl.model.forward_pass import ForwardPass
from scalabl.model.packing import Packing, packing_pays
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.model.token_batch import TokenBatch
from scalabl.passes.probes import find_shared_work
from tests import tiny

SEQUENCES = tiny.ragged((3, 9, 1, 14, 9, 30, 3))


def _pair(name: str, **changes: Any) -> tuple[ScalaBLModel, ScalaBLModel]:
    """The same adapter, padded in every way and packed."""
    padded, packs = tiny.adapted(name, **changes), tiny.adapted(name, **changes)
    find_shared_work(packs)
    assert packs.packs
    return padded, packs


def _linear_tokens(model: ScalaBLModel) -> list[int]:
    """Hears how many tokens the last block's first projection computes."""
    seen: list[int] = []
    block = next(m for m in model.base.modules() if isinstance(m, nn.ModuleList))[-1]
    projection = next(m for n, m in block.named_modules() if n.endswith("k_proj"))
    projection.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel()))
    return seen


# GPT-2 views its output with the number of tokens that went in, before rows fan out.
@pytest.mark.parametrize("layers", [None, (1,)], ids=["all layers", "last layer"])
@pytest.mark.parametrize("name", [name for name in tiny.ARCHITECTURES if name != "gpt2"])
def test_packing_changes_no_number(name: str, layers: tuple[int, ...] | None) -> None:
    # Windows of attention are 6 tokens, and some inputs longer.
    padded, packs = _pair(name, layers_to_transform=layers)
    one, other = packs.draws(3, seed=1), packs.draws(5, seed=3)
    several = [one, packs.draws(1, seed=2), one, other, packs.draws(1, seed=2), one, other]
    for each in (several, [one] * 7, [packs.mean_draw()] * 7):
        batch = TokenBatch.of(SEQUENCES)
        for found, expected in zip(packs.logits_each(batch, each), padded.logits_each(batch, each), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi3"])
def test_on_another_device_packing_changes_no_number(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is taken for a device with a memory of its own, for which tables travel in one buffer."""
    padded, packs = _pair(name)
    for module in (transfer, packing):
        monkeypatch.setattr(module, "on_host", lambda device: False)
    monkeypatch.setattr(packing, "GROUP_TOKENS", 1)
    passes = _passes(packs)
    batch, several = TokenBatch.of(SEQUENCES), [packs.draws(3, seed=1), packs.draws(5, seed=3)] * 3 + [packs.mean_draw()]
    for each in (several, [several[0]] * 7):
        for logits, expected in zip(packs.logits_each(batch, each), padded.logits_each(batch, each), strict=True):
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    assert [forward_pass.packing is not None for forward_pass in passes] == [True, True]


def _passes(model: ScalaBLModel) -> list[ForwardPass]:
    """Hears of each pass."""
    seen: list[ForwardPass] = []
    run = model.run

    def heard(forward_pass: ForwardPass) -> torch.Tensor:
        seen.append(forward_pass)
        return run(forward_pass)

    model.run = heard  # type: ignore[method-assign]  # a spy
    return seen


@pytest.mark.parametrize(
    ("lengths", "counts", "elsewhere"),
    [
        ([50, 50, 50], [16] * 3, True),  # one group
        ([50], [1], True),
        ([49, 50], [16, 16], False),  # 16 tokens saved, 64 to pay
        ([40, 50], [16, 16], True),
        ([40, 50], [1, 1], False),
        ([10, 20, 30, 40], [1, 1, 1, 1], False),  # 60 saved, three more groups
        ([10, 20, 30, 40], [4, 4, 4, 4], True),
    ],
)
def test_padding_is_left_out_where_that_pays(lengths: list[int], counts: list[int], elsewhere: bool) -> None:
    assert packing_pays(torch.tensor(lengths), counts, torch.device("cpu"))
    assert packing_pays(torch.tensor(lengths), counts, torch.device("cuda")) == elsewhere


def test_the_head_alone_may_be_adapted() -> None:
    padded, packs = _pair("llama", target_modules=("lm_head",))
    batch, draws = TokenBatch.of(SEQUENCES), packs.draws(4)
    torch.testing.assert_close(packs.logits(batch, draws), padded.logits(batch, draws), rtol=0, atol=1e-5)


def test_a_packed_pass_may_start_from_the_trunk_s_states() -> None:
    padded, packs = _pair("llama", layers_to_transform=(1,))
    batch, draws = TokenBatch.of(SEQUENCES), packs.draws(4)
    states = packs.trunk_states(*batch.right_padded())
    expected = padded.logits(batch, draws)
    torch.testing.assert_close(packs.logits(batch, draws, states), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(packs.logits(batch, draws), expected, rtol=0, atol=1e-5)


def test_layers_see_real_tokens_alone() -> None:
    model = tiny.adapted(target_modules=("q_proj", "down_proj"))
    tokens = _linear_tokens(model)
    find_shared_work(model)
    tokens.clear()
    model.logits(TokenBatch.of(SEQUENCES), model.draws(4))
    assert tokens == [4 * sum(map(len, SEQUENCES))]


def test_the_base_model_s_attention_is_back_after_a_pass() -> None:
    model = tiny.adapted()
    find_shared_work(model)
    before = model.base.config._attn_implementation
    with pytest.raises(IndexError):
        model.logits(TokenBatch.of([[10_000_000]]), model.draws(2))
    assert model.base.config._attn_implementation == before == "sdpa"
    assert model.logits(TokenBatch.of(SEQUENCES), model.draws(2)).isfinite().all()


def test_architectures_that_need_rows_are_padded() -> None:
    gpt2 = tiny.adapted("gpt2")
    find_shared_work(gpt2)
    assert not gpt2.packs
    torch.manual_seed(0)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=tiny.VOCABULARY, hidden_size=32, n_layer=2, n_head=4)).eval()
    model = ScalaBLModel(bloom, tiny.config_for(target_modules=("query_key_value", "lm_head")))
    tiny.fill(model)
    find_shared_work(model)
    assert not model.packs


def test_eager_attention_is_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.adapted()
    monkeypatch.setattr(model.base.config, "_attn_implementation", "eager")
    find_shared_work(model)
    assert not model.packs


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 4)), min_size=1, max_size=6))
def test_every_token_has_its_place(inputs: list[tuple[int, int]]) -> None:
    inputs = sorted(inputs)
    lengths, counts = [length for length, _ in inputs], [count for _, count in inputs]
    packing = Packing.of(torch.tensor(lengths), counts)
    tokens = [(i, p) for i, length in enumerate(lengths) for p in range(length)]
    rows = [i for i, count in enumerate(counts) for _ in range(count)]
    of_rows = [(row, i, p) for row, i in enumerate(rows) for p in range(lengths[i])]
    assert list(zip(packing.input_of_token.tolist(), packing.position_of_token.tolist(), strict=True)) == tokens
    assert packing.row_of_token.tolist() == [row for row, _, _ in of_rows]
    assert [tokens[n] for n in packing.source.tolist()] == [(i, p) for _, i, p in of_rows]
    assert [of_rows[n][1:] for n in packing.copy.tolist()] == tokens
    assert packing.rows.tokens == len(of_rows)
    assert packing.inputs.tokens == len(tokens)
    assert [of_rows[n][0] for n in packing.rows.last.tolist()] == list(range(len(rows)))
    assert [tokens[n][1] + 1 for n in packing.inputs.last.tolist()] == lengths
    spread = [length for count, length in packing.rows.groups for _ in range(count)]
    assert spread == [lengths[i] for i in rows]
    assert len({length for _, length in packing.rows.groups}) == len(packing.rows.groups)
