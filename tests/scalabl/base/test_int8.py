"""Layers with 8-bit weights and activations: what they compute, what they let through, and when they are refused."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from scalabl.base import int8
from scalabl.base.int8 import Int8Linear, rounds_activations, to_int8, weight_levels
from scalabl.errors import BaseModelError
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.model.token_batch import TokenBatch
from scalabl.passes.prefix import longest_exact
from scalabl.passes.probes import find_shared_work
from scalabl.uncertainty.linearized import linearize
from tests import tiny

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="8-bit products of this kind are an x86 processor's")

BATCH = TokenBatch.of(tiny.ragged())


def _linear(width: int = 40, out: int = 24, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(width, out, bias=bias).requires_grad_(False)


def _reach(x: Tensor) -> Tensor:
    return x.flatten(0, -2).abs().amax(0)


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 40), (2, 3, 40), (1, 1, 40), (0, 40), (5, 301, 40)], ids=str)
def test_the_product_is_that_of_the_layer_within_8_bits(bias: bool, shape: tuple[int, ...]) -> None:
    linear = _linear(bias=bias)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = Int8Linear(linear, torch.ones(40))(x)
    assert found.shape == (*shape[:-1], 24)
    if x.numel():
        assert _error(found, linear(x)) <= 0.02


def test_the_product_is_exact_where_nothing_is_rounded() -> None:
    linear = _linear()
    whole = torch.randint(-127, 128, (24, 40), generator=torch.Generator().manual_seed(2)).float()
    whole[:, 0] = weight_levels()  # every row's largest, so that its scale is 1
    linear.weight.copy_(whole.clamp(-weight_levels(), weight_levels()))
    linear.bias.zero_()
    x = torch.randint(-127, 128, (9, 40), generator=torch.Generator().manual_seed(3)).float()
    x[:, 0] = 127
    assert torch.equal(Int8Linear(linear, torch.zeros(40))(x), linear(x))


def test_transposed_weights_are_read_as_such() -> None:
    torch.manual_seed(0)
    base = Conv1D(24, 40).requires_grad_(False)
    x = torch.randn(5, 40)
    assert _error(Int8Linear(base, _reach(x))(x), base(x)) <= 0.02


def test_no_row_sees_another() -> None:
    layer, x = Int8Linear(_linear(), torch.ones(40)), torch.randn(6, 40)
    alone = layer(x[2:3])
    x[0] *= 1e6
    assert torch.equal(layer(x)[2:3], alone)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row_and_is_seen(value: float) -> None:
    layer, x = Int8Linear(_linear(), torch.ones(40)), torch.randn(3, 40)
    x[1, 4] = value
    assert layer(x).isfinite().all(1).tolist() == [True, False, True]


def test_a_row_of_zeros_gives_the_bias() -> None:
    linear = _linear()
    assert torch.equal(Int8Linear(linear, torch.ones(40))(torch.zeros(2, 40)), linear.bias.expand(2, -1))


def test_channels_that_are_always_large_cost_the_others_little() -> None:
    linear = _linear()
    x = torch.randn(64, 40, generator=torch.Generator().manual_seed(1))
    x[:, 3] *= 100
    linear.weight[:, 3] /= 100  # as a trained model has it
    smooth, plain = (Int8Linear(linear, reach)(x) for reach in (_reach(x), torch.zeros(40)))
    assert _error(smooth, linear(x)) <= 0.3 * _error(plain, linear(x))


def test_narrower_activations_come_back_as_they_were() -> None:
    linear, x = _linear(), torch.randn(5, 40)
    found = Int8Linear(linear.bfloat16(), torch.ones(40))(x.bfloat16())
    assert found.dtype == torch.bfloat16
    assert _error(found.float(), linear.float()(x)) <= 0.03


def test_gradients_are_those_of_the_weights_that_are_multiplied() -> None:
    linear = _linear()
    x = torch.randn(5, 40, requires_grad=True)
    layer = Int8Linear(linear, _reach(x.detach()))
    multiplied = layer.weight_as_multiplied()
    assert _error(multiplied, linear.weight) <= 0.02
    up = torch.randn(5, 24)
    y = layer(x)
    y.backward(up)
    assert torch.allclose(x.grad, up @ multiplied, atol=1e-6)
    with torch.no_grad():
        assert torch.equal(y.detach(), layer(x))


@pytest.mark.parametrize("name", list(tiny.ARCHITECTURES))
def test_every_architecture_keeps_its_answers_and_its_shortcuts(name: str) -> None:
    base = tiny.base_model(name)
    before = base(BATCH.input_ids, attention_mask=BATCH.attention_mask).logits
    linears = sum(isinstance(m, nn.Linear | Conv1D) for m in base.modules())
    assert not rounds_activations(base)
    assert to_int8(base) == linears - 1, "all but the head"
    assert rounds_activations(base)
    after = base(BATCH.input_ids, attention_mask=BATCH.attention_mask).logits
    real = BATCH.attention_mask.bool()
    assert 0 < _error(after[real], before[real]) <= 0.1
    model = ScalaBLModel(base, tiny.config_for(name))
    tiny.fill(model)
    find_shared_work(model.eval())
    assert model.trunk.verified
    assert model.trunk.trims
    assert model.packs == (name != "gpt2")  # which does not with other weights either


def test_shortcuts_are_tried_without_rounding_which_would_hide_what_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _int8_model()
    with monkeypatch.context() as patch:
        patch.setattr(Int8Linear, "multiply", _refuse)
        find_shared_work(model)
        kept = longest_exact(model)
    assert model.packs
    assert model.trunk.trims
    assert kept > 0
    layer, x = Int8Linear(_linear(), torch.ones(40)), torch.randn(3, 40)
    with int8.unrounded():
        torch.testing.assert_close(layer(x), x @ layer.weight_as_multiplied().T + layer.bias)
    assert _error(layer(x), x @ layer.weight_as_multiplied().T + layer.bias) > 1e-4  # rounded again


def _refuse(*_: object) -> Tensor:
    raise AssertionError("activations were rounded")


def _int8_model() -> ScalaBLModel:
    base = tiny.base_model()
    to_int8(base)
    model = ScalaBLModel(base, tiny.config_for("llama"))
    tiny.fill(model)
    return model.eval()


def test_the_linearised_answer_follows_the_sampled_one() -> None:
    base = tiny.base_model()
    to_int8(base)
    model = ScalaBLModel(base, tiny.config_for())
    tiny.fill(model, sigma=0.02)
    draws = model.draws(64)
    linear = linearize(model, BATCH)
    spread = model.logits(BATCH, draws).std(1)
    expected = linear.covariance().diagonal(dim1=-2, dim2=-1).sqrt()[:, 0]
    assert (spread / expected).log().abs().max() <= 0.25, "at this sigma samples are linear but for what is rounded"


def test_replicas_find_the_same() -> None:
    ids, found = BATCH.input_ids, []
    for _ in range(2):
        base = tiny.base_model()
        to_int8(base)
        found.append(base(ids).logits)
    assert torch.equal(*found)


class _ReadsWeights(nn.Linear):
    """A layer whose owner asks for its weights."""


def test_a_model_that_reads_its_layers_weights_is_refused() -> None:
    base = tiny.base_model()
    attention = base.model.layers[1].self_attn
    attention.register_forward_pre_hook(lambda module, _: module.o_proj.weight.sum() and None)
    with pytest.raises(
        BaseModelError, match=r"int8 does not support LlamaForCausalLM, whose code reads its layers' weights"
    ):
        to_int8(base)


def test_layers_derived_from_linear_ones_are_left_alone() -> None:
    base = tiny.base_model()
    mlp = base.model.layers[0].mlp
    mlp.up_proj = _ReadsWeights(32, 48, bias=False)
    to_int8(base)
    assert type(mlp.up_proj) is _ReadsWeights
    assert type(mlp.down_proj) is Int8Linear


def test_another_processor_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8.platform, "machine", lambda: "aarch64")
    with pytest.raises(BaseModelError, match="quantization int8 needs an x86 processor"):
        to_int8(tiny.base_model())


def test_weights_elsewhere_than_in_memory_are_refused() -> None:
    with pytest.raises(BaseModelError, match="works only for a base model on a CPU"):
        to_int8(tiny.base_model().to("meta"))


OLDER = """
import torch
from scalabl.base.int8 import Int8Linear, weight_levels
torch.manual_seed(0)
linear, x = torch.nn.Linear(512, 64, bias=False), torch.ones(8, 512)
linear.weight.data.fill_(1.0)
layer = Int8Linear(linear, torch.ones(512))
print(weight_levels(), float((layer(x) / linear(x) - 1).detach().abs().max()))
"""


def test_a_processor_that_adds_pairs_in_16_bits_gets_weights_that_cannot_overflow_there() -> None:
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}  # oneDNN then does as on such a processor
    run = subprocess.run([sys.executable, "-c", OLDER], env=environment, check=True, capture_output=True, text=True)
    levels, error = run.stdout.split()
    assert levels == "64"
    assert float(error) <= 1e-5, "a product of the largest numbers that there are"
