"""The trunk: blocks before the first stochastic layer run once for each input, and every number stays what it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import BloomConfig, BloomForCausalLM

from scalabl.model.forward_pass import ForwardPass, RowSamples
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.model.token_batch import TokenBatch
from scalabl.passes.probes import find_shared_work
from scalabl.uncertainty.linearized import linearize
from tests import tiny

SEQUENCES = tiny.ragged((3, 9, 1, 14))


def _pair(name: str, **changes: Any) -> tuple[ScalaBLModel, ScalaBLModel]:
    """The same adapter with a trunk and without."""
    plain, split = tiny.adapted(name, **changes), tiny.adapted(name, **changes)
    find_shared_work(split)
    return plain, split


def _entering(model: ScalaBLModel, block: int) -> list[tuple[int, ...]]:
    """Hears what enters a decoder block in each pass: [rows, tokens]."""
    seen: list[tuple[int, ...]] = []
    blocks = next(m for m in model.base.modules() if isinstance(m, nn.ModuleList))
    blocks[block].register_forward_pre_hook(lambda _, args, kwargs: seen.append(tuple(args[0].shape[:2])), with_kwargs=True)
    return seen


@pytest.mark.parametrize("layers", [None, (1,)], ids=["all layers", "last layer"])
@pytest.mark.parametrize("name", list(tiny.ARCHITECTURES))
def test_the_trunk_changes_no_number(name: str, layers: tuple[int, ...] | None) -> None:
    plain, split = _pair(name, layers_to_transform=layers)
    assert split.trunk.verified
    assert split.trunk.trims
    assert split.trunk.depth == (0 if layers is None else 1)
    draws = [split.draws(3, seed=1), split.draws(1, seed=2), split.draws(3, seed=1), split.draws(5, seed=3)]
    for sequences, each in ((SEQUENCES, draws), (SEQUENCES, [draws[0]] * 4), (SEQUENCES[:1], draws[:1])):
        batch = TokenBatch.of(sequences)
        for found, expected in zip(split.logits_each(batch, each), plain.logits_each(batch, each), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    found, expected = (linearize(model, TokenBatch.of(SEQUENCES)) for model in (split, plain))
    torch.testing.assert_close(found.scaled_jacobian, expected.scaled_jacobian, rtol=1e-4, atol=1e-5)


def test_blocks_before_the_first_adapted_one_see_a_row_for_each_input() -> None:
    model = tiny.adapted(layers_to_transform=(1,))
    find_shared_work(model)
    first, second = _entering(model, 0), _entering(model, 1)
    model.logits(TokenBatch.of(SEQUENCES), model.draws(8))
    model.packs = False
    model.logits(TokenBatch.of(SEQUENCES), model.draws(8))
    assert first == [(1, 27), (4, 14)]
    assert second == [(1, 8 * 27), (32, 14)]


def test_the_last_mlp_computes_the_position_that_is_read() -> None:
    model = tiny.adapted()
    find_shared_work(model)
    seen: list[tuple[int, ...]] = []
    for block in model.base.model.layers:
        block.mlp.act_fn.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[:2])))
    model.logits(TokenBatch.of(SEQUENCES), model.draws(8))
    model.packs = False
    model.logits(TokenBatch.of(SEQUENCES), model.draws(8))
    assert seen == [(1, 8 * 27), (1, 32), (32, 14), (32, 1)]


def test_a_block_that_mixes_positions_after_its_mlp_is_not_trimmed() -> None:
    model = tiny.adapted()
    mixed = model.base.model.layers[-1].mlp
    mixed.register_forward_hook(lambda _, args, output: output + args[0].cumsum(1))
    expected = model.logits(TokenBatch.of(SEQUENCES), model.draws(3))
    find_shared_work(model)
    assert not model.trunk.trims
    torch.testing.assert_close(model.logits(TokenBatch.of(SEQUENCES), model.draws(3)), expected)


def test_with_the_head_alone_adapted_every_block_is_trunk() -> None:
    plain, split = _pair("llama", target_modules=("lm_head",))
    batch, draws = TokenBatch.of(SEQUENCES), split.draws(8)
    last = _entering(split, 1)
    torch.testing.assert_close(split.logits(batch, draws), plain.logits(batch, draws), rtol=0, atol=1e-5)
    assert last == [(1, 27)]


@pytest.mark.parametrize("name", list(tiny.ARCHITECTURES))
def test_a_pass_may_start_from_the_trunk_s_states(name: str) -> None:
    model = tiny.adapted(name, layers_to_transform=(1,))
    find_shared_work(model)
    ids, lengths = TokenBatch.of(SEQUENCES).right_padded()
    samples = RowSamples(model.sample(model.draws(4).epsilon), torch.arange(4))
    expected = model.run(ForwardPass(ids, lengths, samples))
    states = model.trunk_states(ids, lengths)
    first = _entering(model, 0)
    torch.testing.assert_close(model.run(ForwardPass(torch.zeros_like(ids), lengths, samples, states=states)), expected)
    assert first == [(4, 14)]  # passed on, not computed
    torch.testing.assert_close(model.run(ForwardPass(ids, lengths, samples)), expected)  # and the trunk is back afterwards


def test_an_argument_as_long_as_there_are_inputs_is_not_taken_for_one_of_theirs() -> None:
    model = tiny.adapted(layers_to_transform=(1,))
    found: list[torch.Size] = []

    def give(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs | {"table": torch.zeros(4, 7), "each": [torch.zeros(args[0].shape[0], 1)]}

    def look(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(kwargs["table"].shape)
        found.append(kwargs["each"][0].shape)

    block = model.base.model.layers[1]
    model.detach()
    block.register_forward_pre_hook(give, with_kwargs=True)
    model.attach()
    block.register_forward_pre_hook(look, with_kwargs=True)
    find_shared_work(model)
    assert model.trunk.verified
    found.clear()
    model.packs = False
    model.logits(TokenBatch.of(SEQUENCES), model.draws(8))
    assert found == [(4, 7), (32, 1)]


def test_an_architecture_that_flattens_heads_into_rows_runs_without_a_trunk() -> None:
    torch.manual_seed(0)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=tiny.VOCABULARY, hidden_size=32, n_layer=2, n_head=4)).eval()
    config = tiny.config_for(target_modules=("query_key_value", "lm_head"))
    model = ScalaBLModel(bloom, config)
    tiny.fill(model)
    find_shared_work(model)
    assert not model.trunk.verified
    batch, draws = TokenBatch.of(SEQUENCES), model.draws(3)
    each = [model.logits(TokenBatch.of([sequence]), draws)[0] for sequence in SEQUENCES]
    torch.testing.assert_close(model.logits(batch, draws), torch.stack(each), rtol=0, atol=1e-5)


def test_two_adapters_of_one_base_have_trunks_of_their_own() -> None:
    base = tiny.base_model()
    models = [ScalaBLModel(base, tiny.config_for(layers_to_transform=layers)) for layers in (None, (1,))]
    alone = [tiny.adapted(layers_to_transform=layers) for layers in (None, (1,))]
    for model in models:
        tiny.fill(model)
        find_shared_work(model)
    batch = TokenBatch.of(SEQUENCES)
    for _ in range(2):
        for model, expected in zip(models, alone, strict=True):
            draws = model.draws(3)
            torch.testing.assert_close(model.logits(batch, draws), expected.logits(batch, draws), rtol=0, atol=1e-5)
