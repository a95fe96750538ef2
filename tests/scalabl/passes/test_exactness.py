"""An input is answered as if it were alone, or its base model or adapted module is refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

from benchmarks.random_model import SMALL, random_base
from scalabl.base.positions import unscaled_length
from scalabl.base.pretrained import longest_prompt
from scalabl.config import AdapterConfig
from scalabl.errors import AdapterError, BaseModelError
from scalabl.model.forward_pass import ForwardPass, RowSamples
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.model.token_batch import TokenBatch
from scalabl.passes.exactness import check_shapes
from scalabl.passes.probes import find_shared_work
from scalabl.passes.trunk_cache import TrunkCache
from scalabl.uncertainty.linearized import linearize
from tests import tiny
from tests.architectures.tiny_types import VOCABULARY, tiny_config, tiny_model

TASK = tiny.CLASSIFICATION.model_copy(update={"choice_tokens": (5, 17, 40)})


def _adapted(base: Any, *targets: str, **changes: Any) -> ScalaBLModel:
    model = ScalaBLModel(base, tiny.config_for().model_copy(update={"task": TASK, "target_modules": targets} | changes))
    tiny.fill(model)
    return model.requires_grad_(False).eval()


def _of_type(name: str, *targets: str, **changes: Any) -> ScalaBLModel:
    return _adapted(tiny_model(tiny_config(name)), *targets, **changes)


def _sequences(*lengths: int) -> list[list[int]]:
    return [[3 + (7 * i + n) % (VOCABULARY - 3) for i in range(n)] for n in lengths]


def _check_alone(model: ScalaBLModel, sequences: list[list[int]]) -> None:
    """Every way to run these inputs together gives what each of them alone gives, with one row in a pass."""
    draws = model.draws(2, seed=3)
    s = model.sample(draws.epsilon)
    one = torch.zeros(1, dtype=torch.int64)
    rows = [
        model.run(ForwardPass(torch.tensor([ids]), torch.tensor([len(ids)]), RowSamples(s_k.unsqueeze(0), one)))
        for ids in sequences
        for s_k in s
    ]
    expected = torch.cat(rows).view(len(sequences), len(s), -1)
    batch = TokenBatch.of(sequences)
    ids, lengths = batch.right_padded()
    for packs in {model.packs, False}:
        model.packs = packs
        torch.testing.assert_close(model.logits(batch, draws), expected, rtol=0, atol=1e-5)
        if model.trunk.has_states:
            states = model.trunk_states(ids, lengths)
            torch.testing.assert_close(model.logits(batch, draws, states), expected, rtol=0, atol=1e-5)
            states = TrunkCache(model, sequences).of(torch.arange(len(sequences)), ids.shape[1])
            torch.testing.assert_close(model.logits(batch, draws, states), expected, rtol=0, atol=1e-5)
    means = torch.cat([linearize(model, TokenBatch.of([one_input])).scaled_jacobian for one_input in sequences])
    torch.testing.assert_close(linearize(model, batch).scaled_jacobian, means, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layers", [None, (1,)], ids=["all layers", "last layer"])
def test_an_encoder_is_served_exactly_with_attention_masks(layers: tuple[int, ...] | None) -> None:
    model = _of_type("bert", "query", "value", "decoder", layers_to_transform=layers)
    find_shared_work(model)
    assert model.masks
    assert model.trunk.has_states == (layers is not None)
    _check_alone(model, _sequences(3, 9, 5, 14))


def test_a_decoder_that_its_configuration_makes_bidirectional_is_served_exactly_too() -> None:
    config = tiny_config("gemma3_text")
    config.use_bidirectional_attention = True
    model = _adapted(tiny_model(config), "q_proj", "down_proj", "lm_head")
    find_shared_work(model)
    assert model.masks
    _check_alone(model, _sequences(3, 9, 5, 14))


def test_a_causal_model_gets_no_mask() -> None:
    model = tiny.adapted()
    find_shared_work(model)
    assert not model.masks


def _sees_its_neighbours(base: Any) -> None:
    """Let every position see the longest row: its mean over all positions, padding included."""
    base.model.layers[0].register_forward_hook(lambda _, args, output: output + output.mean(1, keepdim=True))


def test_a_base_model_that_sees_padding_in_spite_of_a_mask_is_refused() -> None:
    base = tiny.base_model()
    _sees_its_neighbours(base)
    model = _adapted(base, "q_proj", "v_proj", "lm_head")
    with pytest.raises(BaseModelError, match="LlamaForCausalLM answers an input differently when longer inputs are beside"):
        find_shared_work(model)


def test_an_untrained_adapter_is_checked_with_an_effect_and_left_as_it_was() -> None:
    model = _of_type("bert", "query", "value", "decoder")
    model.reset_adapter(0)
    find_shared_work(model)
    assert model.masks
    assert not any(bool(layer.lora_B.any()) for layer in model.adapted.values())


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("opt", ("fc1", "fc2", "q_proj")),
        ("qwen2_moe", ("shared_expert_gate", "gate_proj", "down_proj", "q_proj")),
        ("mamba", ("in_proj", "x_proj", "out_proj", "lm_head")),
    ],
)
def test_layers_that_get_all_rows_tokens_in_one_dimension_are_adapted_exactly(name: str, targets: tuple[str, ...]) -> None:
    model = _of_type(name, *targets)
    find_shared_work(model)
    _check_alone(model, _sequences(3, 9, 5, 14))


class Experts(nn.Module):
    """A router that sends each token to one of two experts, each a linear layer that gets its own tokens only."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        chosen = flat[:, 0] > 0
        result = torch.zeros_like(flat)
        result[chosen], result[~chosen] = self.experts[0](flat[chosen]), self.experts[1](flat[~chosen])
        return result.view(x.shape)


class Router(nn.Linear):
    """A subclass that gives more than the product."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]  # that is the point
        return super().forward(x), x

    def __init__(self) -> None:
        super().__init__(32, 4)


class Routed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = Router()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.router(x)[0].sum(-1, keepdim=True)


@pytest.mark.parametrize(
    ("mlp", "target", "message"),
    [
        (
            Experts,
            "experts.0",
            r"'model.layers.1.mlp.experts.0' of .* gets \d+ of \d+ tokens, as a routed expert does",
        ),
        (
            Routed,
            "router",
            r"'model.layers.1.mlp.router' of .* is a Router, which is not a plain linear layer",
        ),
    ],
)
def test_a_layer_whose_rows_are_unknown_is_refused_by_name(mlp: type[nn.Module], target: str, message: str) -> None:
    base = tiny.base_model()
    base.model.layers[1].mlp = mlp()
    with pytest.raises(AdapterError, match=message):
        find_shared_work(_adapted(base, "q_proj", target))


def test_a_layer_whose_weight_is_used_without_calling_it_is_refused_by_name() -> None:
    with pytest.raises(AdapterError, match=r"'backbone.layers.0.mixer.dt_proj' .* is not called as a layer"):
        find_shared_work(_of_type("mamba", "in_proj", "dt_proj"))


def test_a_layer_that_a_text_does_not_use_is_said_once_and_never_used_later(caplog: pytest.LogCaptureFixture) -> None:
    model = _of_type("bart", "q_proj", "lm_head")
    find_shared_work(model)
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "2 adapted modules have no effect, because the base model does not use them when it reads a text: "
        "model.decoder.layers.0.encoder_attn.q_proj, model.decoder.layers.1.encoder_attn.q_proj"
    ]
    layer = model.adapted["model.decoder.layers.0.self_attn.q_proj"]
    layer.unused = True
    with pytest.raises(RuntimeError, match="a layer is used now that the passes at the start did not use"):
        model.logits(TokenBatch.of([[3, 4]]), model.draws(1))
    with pytest.raises(AdapterError, match="no adapted module of the base model BartForCausalLM is used when it reads"):
        find_shared_work(_of_type("bart", r"encoder_attn.q_proj"))


def test_a_base_model_that_needs_more_than_tokens_is_refused() -> None:
    base = tiny.base_model()

    def fail(*_: Any) -> None:
        raise ValueError("pixel_values are needed")

    base.model.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(BaseModelError, match=r"cannot be run on token ids alone \(ValueError: pixel_values are needed\)"):
        find_shared_work(_adapted(base, "q_proj"))


def test_layers_are_checked_without_weights() -> None:
    def config(*targets: str) -> AdapterConfig:
        return tiny.config_for().model_copy(update={"task": TASK, "target_modules": targets})

    for name, fits, does_not in (("qwen2_moe", "shared_expert_gate", None), ("llama4_text", "q_proj", "router")):
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(tiny_config(name))
        check_shapes(skeleton, config(fits))
        if does_not is not None:
            with pytest.raises(AdapterError, match=r"'model.layers.0.feed_forward.router' .* is a Llama4Router"):
                check_shapes(skeleton, config(fits, does_not))
        assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert torch.get_default_dtype() == torch.float32


LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 8,
    "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 3.0, 4.0, 5.0],
}  # fmt: skip


@pytest.mark.parametrize("layers", [None, (1,)], ids=["all layers", "last layer"])
def test_a_short_prompt_keeps_its_positions_beside_a_long_one(layers: tuple[int, ...] | None) -> None:
    base = random_base(Phi3Config(**SMALL, original_max_position_embeddings=8, rope_parameters=LONGROPE))
    assert unscaled_length(base) == 8
    model = _adapted(base, "qkv_proj", "gate_up_proj", "lm_head", layers_to_transform=layers)
    find_shared_work(model)
    _check_alone(model, _sequences(3, 12, 8, 9, 5))
    _check_alone(model, _sequences(12, 9))
    _check_alone(model, _sequences(3, 8))


def test_no_prompt_is_so_long_that_dynamic_positions_are_scaled() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    base = random_base(LlamaConfig(**SMALL | {"max_position_embeddings": 16}, rope_parameters=rope))
    assert unscaled_length(base) == longest_prompt(base.config, tiny.tokenizer()) == 16
