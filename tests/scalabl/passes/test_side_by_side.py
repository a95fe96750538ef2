"""Inputs for several adapters in one pass: each has the logits of its own adapter, and the base layers run once."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from scalabl.config import Task
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.model.token_batch import TokenBatch
from scalabl.passes.prefix_cache import PrefixCache, PrefixStore
from scalabl.passes.probes import find_shared_work
from scalabl.passes.side_by_side import (
    KEPT,
    Combinations,
    SharedRounds,
    SideBySide,
    agree_side_by_side,
    pass_shape,
)
from tests import tiny

MANY = Task(kind="classification", template="{input}!", choices=("a", "b", "c", "d", "e"))
LONG, *TAILS = tiny.ragged((100, 3, 9, 1, 14))


def _on(base: PreTrainedModel, name: str, task: Task, seed: int, **changes: Any) -> ScalaBLModel:
    model = tiny.random_adapter(base, tiny.config_for(name, task, **changes), seed)
    find_shared_work(model)
    return model


def _models(name: str = "llama", **changes: Any) -> list[ScalaBLModel]:
    """Three adapters of one base model: of three choices, of four letters, and a mixture of five choices."""
    base = tiny.base_model(name)
    return [
        _on(base, name, tiny.CLASSIFICATION, 0, **changes),
        _on(base, name, tiny.MULTIPLE_CHOICE, 1, posterior_scale=0.5, **changes),
        _on(base, name, MANY, 2, **changes | tiny.MIXTURE),
    ]


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in tiny.ARCHITECTURES),
        ("llama", {"layers_to_transform": (1,)}),
        ("llama", {"target_modules": ("lm_head",)}),
        ("llama", {"target_modules": ("q_proj",)}),  # heads that are not adapted
    ],
    ids=str,
)
def test_each_input_has_the_logits_of_its_own_adapter(name: str, changes: dict[str, Any]) -> None:
    models = _models(name, **changes)
    assert len({pass_shape(model) for model in models}) == 1
    adapters = [2, 0, 1, 0, 2, 1]
    sequences = tiny.ragged((3, 9, 1, 14, 5, 9))
    counts = [4, 2, 5, 1, 4, 2]
    draws = [models[place].draws(count, seed=count) for place, count in zip(adapters, counts, strict=True)]
    together = SideBySide(models).readings(TokenBatch.of(sequences), draws, adapters)
    for ids, own, place, reading in zip(sequences, draws, adapters, together, strict=True):
        (expected,) = models[place].readings(TokenBatch.of([ids]), [own])
        assert reading.logits.shape == expected.logits.shape
        assert (reading.logits - expected.logits).abs().max() <= 1e-5
        assert (reading.state - expected.state).abs().max() <= 1e-4
    assert agree_side_by_side(models[0], models[2])


def test_each_base_layer_runs_once_for_all_adapters() -> None:
    models = _models()
    layers = [module for module in models[0].base.modules() if isinstance(module, nn.Linear | Conv1D)]
    in_head = {id(module) for model in models for module in (model.adapted["lm_head"].base,)}
    calls: list[int] = []
    hooks = [
        layer.register_forward_hook(lambda module, *_: calls.append(id(module)))
        for layer in layers
        if id(layer) not in in_head
    ]
    draws = [model.draws(6) for model in models]
    SideBySide(models).readings(TokenBatch.of(tiny.ragged((3, 9, 4))), draws, [0, 1, 2])
    for hook in hooks:
        hook.remove()
    assert calls
    assert len(calls) == len(set(calls))


@pytest.mark.parametrize(
    "changes", [{"r": 2}, {"lora_alpha": 4.0}, {"target_modules": ("q_proj", "lm_head")}, {"layers_to_transform": (1,)}]
)
def test_adapters_of_another_form_have_another_shape(changes: dict[str, Any]) -> None:
    base = tiny.base_model()
    shapes = {pass_shape(_on(base, "llama", tiny.CLASSIFICATION, 0, **more)) for more in ({}, changes)}
    assert len(shapes) == 2


def test_a_shared_pass_that_differs_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    models = _models()
    real = SideBySide.readings

    def wrong(self: SideBySide, batch: TokenBatch, draws: Any, adapters: Any, states: Any = None) -> Any:
        return real(self, batch, draws, adapters, states)[::-1]

    monkeypatch.setattr(SideBySide, "readings", wrong)
    assert not agree_side_by_side(models[0], models[1])


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("layers", [None, (1,)])
def test_rounds_over_several_adapters_go_on_as_those_of_each(layers: tuple[int, ...] | None, cached: bool) -> None:
    models = _models(layers_to_transform=layers)
    store = PrefixStore(2**24)
    caches = {model: PrefixCache(store, model) for model in models} if cached else {}
    prompts = {index: (LONG + tail if index % 2 else tail) for index, tail in enumerate(2 * TAILS)}
    of = {index: models[index % 3] for index in prompts}
    whole = {index: model.draws(12) for index, model in of.items()}
    for _ in range(2):  # with the second batch some prefixes are cached
        first = {index: draws.part(0, 4) for index, draws in whole.items()}
        rounds = SharedRounds(of, prompts, first, caches, Combinations(), keeps_trunk=True)
        found = rounds.readings(first)
        for going in ([0, 1, 2, 4, 5], [0, 3]):  # the second is of one adapter alone
            more = rounds.readings({index: whole[index].part(4, 12) for index in going})
            assert list(more) == going
            for index in going:
                reading = found[index].and_then(more[index])
                (expected,) = of[index].readings(TokenBatch.of([prompts[index]]), [whole[index]])
                assert (reading.logits - expected.logits).abs().max() <= 1e-5
                assert (reading.state - expected.state).abs().max() <= 1e-4
    assert bool(store.bytes) == cached


def test_few_combinations_are_kept_and_none_of_an_adapter_that_is_unloaded() -> None:
    models = _models()
    combinations = Combinations()
    first = combinations.of(models[:2])
    assert combinations.of(models[1::-1]) is first
    combinations.forget(models[0])
    assert combinations.of(models[:2]) is not first
    others = [_on(models[0].base, "llama", tiny.CLASSIFICATION, seed) for seed in range(KEPT)]
    kept = combinations.of(models[:2])
    for other in others:
        combinations.of([models[0], other])
    assert combinations.of(models[:2]) is not kept
