"""A kept beginning: with it and without it, every number is the same, or it is not used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BloomConfig, BloomForCausalLM, Lfm2Config, Phi3Config

from scalabl.model.past import Past
from scalabl.model.posterior import Draws
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.model.token_batch import TokenBatch
from scalabl.passes.prefix import UNLIMITED, longest_exact
from scalabl.passes.probes import find_shared_work
from tests import tiny

PREFIX, *RESTS = tiny.ragged((11, 3, 9, 1, 14))
ADAPTED: dict[str, dict[str, Any]] = {
    "all layers": {},
    "last layer": {"layers_to_transform": (1,)},
    "head": {"target_modules": ("lm_head",)},
}


@pytest.mark.parametrize("changes", ADAPTED.values(), ids=list(ADAPTED))
@pytest.mark.parametrize("name", list(tiny.ARCHITECTURES))
def test_a_kept_beginning_changes_no_number(name: str, changes: dict[str, Any]) -> None:
    # The windows of mistral and gemma3 are 6 tokens long, shorter than the beginning.
    plain, model = tiny.adapted(name, **changes), tiny.adapted(name, **changes)
    find_shared_work(model)
    assert longest_exact(model) == UNLIMITED
    three, five, one = (model.draws(count, seed=seed) for count, seed in ((3, 1), (5, 2), (1, 3)))
    for draws in ([three] * 4, [three, five, three, one], [one] * 4):
        past = Past({of_input.key: [model.prefix(PREFIX, of_input)] for of_input in draws}, len(PREFIX))
        found = model.logits_each(TokenBatch.of(RESTS), draws, past=past)
        expected = plain.logits_each(TokenBatch.of([PREFIX + rest for rest in RESTS]), draws)
        for one_found, one_expected in zip(found, expected, strict=True):
            torch.testing.assert_close(one_found, one_expected, rtol=0, atol=1e-5)


def test_a_part_of_what_is_kept_serves_a_shorter_beginning_and_a_longer_one_goes_on_from_it() -> None:
    plain, model = tiny.adapted(layers_to_transform=(1,)), tiny.adapted(layers_to_transform=(1,))
    find_shared_work(model)
    draws = model.draws(4)
    half = model.prefix(PREFIX[:7], draws)
    halves = [half.samples(0, 1), half.samples(1, 4)]
    whole = model.prefix(PREFIX[5:], draws, Past({draws.key: halves}, 5))
    assert (half.length, whole.length) == (7, 11)
    for start, parts in ((11, [whole]), (4, [whole]), (7, halves), (6, [half])):
        prompts = [PREFIX[:start] + rest for rest in RESTS]
        found = model.logits_each(TokenBatch.of(RESTS), [draws] * 4, past=Past({draws.key: parts}, start))
        torch.testing.assert_close(torch.stack(found), plain.logits(TokenBatch.of(prompts), draws), rtol=0, atol=1e-5)


def test_the_trunk_s_states_go_with_it() -> None:
    plain, model = tiny.adapted(layers_to_transform=(1,)), tiny.adapted(layers_to_transform=(1,))
    find_shared_work(model)
    draws = model.draws(4)
    past = Past({draws.key: [model.prefix(PREFIX, draws)]}, len(PREFIX))
    batch = TokenBatch.of(RESTS)
    states = model.trunk_states(*batch.right_padded(), past)
    found = torch.stack(model.logits_each(TokenBatch.of(RESTS), [draws] * 4, states, past))
    expected = plain.logits(TokenBatch.of([PREFIX + rest for rest in RESTS]), draws)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_one_row_for_each_sample_is_kept_and_one_in_the_trunk() -> None:
    model = tiny.adapted(layers_to_transform=(1,))
    find_shared_work(model)
    kept = model.prefix(PREFIX, model.draws(6))
    assert [tuple(keys.shape) for keys, _ in kept.layers] == [(1, 2, 11, 8), (6, 2, 11, 8)]
    assert kept.nbytes == (1 + 6) * 2 * 2 * 11 * 8 * 4


def _adapted(base: Any, *targets: str) -> ScalaBLModel:
    model = ScalaBLModel(base.requires_grad_(False).eval(), tiny.config_for(target_modules=targets))
    tiny.fill(model)
    find_shared_work(model)
    return model


def test_an_architecture_that_keeps_no_keys_and_values_is_found_out() -> None:
    config = Lfm2Config(**tiny.SMALL, layer_types=["conv", "full_attention"])  # convolutions have a state of another kind
    assert longest_exact(_adapted(AutoModelForCausalLM.from_config(config, dtype=torch.float32), "q_proj", "lm_head")) == 0


def test_an_architecture_without_a_trunk_keeps_a_row_for_each_sample_everywhere() -> None:
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=tiny.VOCABULARY, hidden_size=32, n_layer=2, n_head=4)
    model = _adapted(BloomForCausalLM(config), "query_key_value", "lm_head")
    assert not model.trunk.verified
    assert longest_exact(model) == UNLIMITED
    draws = model.draws(3)
    past = Past({draws.key: [model.prefix(PREFIX, draws)]}, len(PREFIX))
    found = torch.stack(model.logits_each(TokenBatch.of(RESTS), [draws] * 4, past=past))
    expected = model.logits(TokenBatch.of([PREFIX + rest for rest in RESTS]), draws)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_model_that_looks_at_positions_from_the_start_of_the_pass_is_found_out() -> None:
    model = tiny.adapted()
    find_shared_work(model)

    def restart(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs | {"position_ids": kwargs["position_ids"] - kwargs["position_ids"][:, :1]}

    model.base.model.rotary_emb.register_forward_pre_hook(restart, with_kwargs=True)
    assert longest_exact(model) == 0


def test_beyond_a_window_that_was_not_tried_nothing_is_kept() -> None:
    config = tiny.ARCHITECTURES["mistral"][0].to_dict() | {"sliding_window": 300}
    base = AutoModelForCausalLM.from_config(type(tiny.ARCHITECTURES["mistral"][0])(**config), dtype=torch.float32)
    assert longest_exact(_adapted(base, "q_proj", "lm_head")) == 300


def test_beyond_the_length_from_which_positions_are_scaled_by_it_nothing_is_kept() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = Phi3Config(**tiny.SMALL, original_max_position_embeddings=64, rope_parameters=rope)
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert longest_exact(_adapted(base, "qkv_proj", "lm_head")) == 64


def test_a_part_of_a_sequence_of_draws_knows_its_place() -> None:
    model = tiny.adapted()
    assert model.draws(8).part(2, 6).part(1, 3).start == 3
    assert model.mean_draw().start is None
    assert Draws(0, "gaussian", torch.zeros(2, 3)).part(1, 2).start is None
