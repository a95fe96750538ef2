"""Several adapters over one base model: its weights exist once, and each adapter answers as if it were alone."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

from scalabl.files.adapter_directory import load_adapter, read_adapter
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.model.token_batch import TokenBatch
from scalabl.passes.probes import find_shared_work
from tests import tiny

BATCH = TokenBatch.of(tiny.ragged())
# (task, seed of its values, changes of the configuration): different choices, layers and ranks
KINDS = (
    (tiny.CLASSIFICATION, 0, {}),
    (tiny.MULTIPLE_CHOICE, 1, {"r": 2}),
    (tiny.CLASSIFICATION, 2, {"layers_to_transform": (1,)}),
)


def _alone(name: str, kind: int) -> torch.Tensor:
    task, seed, changes = KINDS[kind]
    model = tiny.adapted(name, task, seed, **changes)
    return model.logits(BATCH, model.draws(3))


def _together(name: str) -> list[ScalaBLModel]:
    base, models = tiny.base_model(name), []
    for task, seed, changes in KINDS:
        models.append(ScalaBLModel(base, tiny.config_for(name, task, **changes)))
        tiny.fill(models[-1], seed)
    return models


@pytest.mark.parametrize("name", list(tiny.ARCHITECTURES))
def test_adapters_that_share_a_base_answer_as_each_does_alone(name: str) -> None:
    models = _together(name)
    expected = [_alone(name, kind) for kind in range(len(KINDS))]
    for kind in (0, 1, 2, 1, 0, 0, 2):  # a pass attaches what it needs
        model = models[kind]
        assert torch.equal(model.logits(BATCH, model.draws(3)), expected[kind])


@pytest.mark.parametrize("name", list(tiny.ARCHITECTURES))
def test_detaching_gives_the_base_model_back(name: str) -> None:
    models, plain = _together(name), tiny.base_model(name)
    base = models[0].base
    models[0].attach()
    models[1].detach()  # is not in, so that nothing happens
    assert any(layer in set(base.modules()) for layer in models[0].adapted.values())
    models[0].detach()
    assert [name for name, _ in base.named_modules()] == [name for name, _ in plain.named_modules()]
    assert torch.equal(base(BATCH.input_ids).logits, plain(BATCH.input_ids).logits)


def test_the_weights_of_the_base_exist_once() -> None:
    base = tiny.base_model("qwen2")  # a head that is not tied to the embeddings
    before = {name: parameter.data_ptr() for name, parameter in base.named_parameters()}
    models = [ScalaBLModel(base, tiny.config_for("qwen2")) for _ in range(4)]
    reached = [p for model in models for layer in model.adapted.values() for p in layer.parameters()]
    for model in models:
        for name, layer in model.adapted.items():
            if name != "lm_head":
                assert layer.base.weight.data_ptr() == before[f"{name}.weight"]
        model.detach()
    assert {name: parameter.data_ptr() for name, parameter in base.named_parameters()} == before
    # Beside the base there are the adapters' own tensors, and each one's three rows of the head.
    own = sum(p.nbytes for model in models for p in model.adapter_parameters().values())
    beside = {p.data_ptr(): p.nbytes for p in reached if p.data_ptr() not in before.values()}
    assert sum(beside.values()) == own + 4 * 3 * base.config.hidden_size * 4


def test_an_adapter_that_is_read_leaves_the_base_and_the_attached_adapter_alone(tmp_path: Path) -> None:
    first = tiny.adapted()
    names = [name for name, _ in first.base.named_modules()]
    folder = tiny.write_adapter(tmp_path / "letters", task=tiny.MULTIPLE_CHOICE)
    second = read_adapter(first.base, folder)
    assert [name for name, _ in first.base.named_modules()] == names
    assert not any(parameter.requires_grad for parameter in second.adapter_parameters().values())
    loaded = load_adapter(tiny.base_model(), folder)
    find_shared_work(second)  # as loading does: to the last bit the same passes
    assert torch.equal(second.logits(BATCH, second.draws(3)), loaded.logits(BATCH, loaded.draws(3)))


def test_an_adapter_that_is_let_go_of_leaves_nothing_behind() -> None:
    first = tiny.adapted()
    second = ScalaBLModel(first.base, tiny.config_for())
    gone = weakref.ref(second)
    second.detach()
    del second
    gc.collect()
    assert gone() is None
    assert not [m for m in first.base.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad]
