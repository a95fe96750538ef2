"""One pass over B * K rows against what it stands for: K models with their weights merged, run input by input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from scalabl.errors import AdapterError
from scalabl.model.layer import SubspaceLinear
from scalabl.model.posterior import Draws
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.model.token_batch import TokenBatch
from tests import tiny
from tests.watching import LargestTensor

K = 5
LENGTHS = (3, 9, 1, 14)


def _left_padded(sequences: list[list[int]]) -> TokenBatch:
    width = max(map(len, sequences))
    ids = torch.tensor([[0] * (width - len(s)) + s for s in sequences])
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences])
    return TokenBatch(ids, mask)


def _merged(name: str, model: ScalaBLModel, s: Tensor) -> PreTrainedModel:
    """A plain transformers model with W0 + scaling * B diag(s) A in the place of each adapted layer; s [P]."""
    plain = tiny.base_model(name)
    head = plain.get_output_embeddings()
    if head.weight is plain.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)  # the embedding stays as it was
    scaling, rank = model.config.scaling, model.config.r
    for index, (path, layer) in enumerate(model.adapted.items()):
        scalars = s[index * rank : (index + 1) * rank]
        delta = scaling * layer.lora_B @ torch.diag(scalars) @ layer.lora_A
        target = plain.get_submodule(path)
        if target is head:
            assert model.config.task.choice_tokens is not None
            target.weight[list(model.config.task.choice_tokens)] += delta
        else:
            target.weight += delta.T if isinstance(target, Conv1D) else delta
    return plain


@pytest.fixture(scope="module", params=list(tiny.ARCHITECTURES))
def compared(request: pytest.FixtureRequest) -> tuple[ScalaBLModel, Draws, Tensor]:
    """(model, draws, expected [B, K, C]): the expectation comes from unpadded passes of merged models."""
    model = tiny.adapted(request.param)
    draws = model.draws(K, seed=3)
    choices = list(model.config.task.choice_tokens or ())
    with torch.no_grad():
        samples = model.sample(draws.epsilon)
        expected = torch.stack(
            [
                torch.stack([plain(torch.tensor([ids])).logits[0, -1, choices] for ids in tiny.ragged(LENGTHS)])
                for plain in (_merged(request.param, model, s) for s in samples)
            ],
            dim=1,
        )
    return model, draws, expected


@pytest.mark.parametrize("pad", [TokenBatch.of, _left_padded], ids=["right", "left"])
def test_one_pass_equals_one_pass_per_sample_with_merged_weights(
    compared: tuple[ScalaBLModel, Draws, Tensor], pad: Any
) -> None:
    model, draws, expected = compared
    logits = model.logits(pad(tiny.ragged(LENGTHS)), draws)
    assert logits.shape == (4, K, 3)
    assert (expected.std(dim=1) > 0.05).all(), "the samples differ, so that the comparison says something"
    assert (logits - expected).abs().max() <= 1e-5


@contextmanager
def _counted_calls(model: ScalaBLModel) -> Iterator[dict[str, int]]:
    calls: dict[str, int] = {}
    handles = []
    for name, module in model.base.named_modules():
        if isinstance(module, nn.Linear | Conv1D | nn.Embedding):

            def count(*_: Any, name: str = name) -> None:
                calls[name] = calls.get(name, 0) + 1

            handles.append(module.register_forward_hook(count))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize(("num_samples", "changes"), [(1, {}), (8, {}), (32, {}), (8, tiny.MIXTURE)], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_each_base_layer_runs_once_per_batch_whatever_the_number_of_samples(
    name: str, num_samples: int, changes: dict[str, Any]
) -> None:
    model = tiny.adapted(name, **changes)
    linear = [n for n, m in model.base.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    with _counted_calls(model) as calls:
        model.logits(TokenBatch.of(tiny.ragged()), model.draws(num_samples))
    assert set(linear) <= calls.keys()
    assert set(calls.values()) == {1}


def test_memory_grows_with_activations_and_holds_no_weight_per_sample() -> None:
    small: dict[str, Any] = tiny.SMALL | {"hidden_size": 128, "intermediate_size": 256}
    torch.manual_seed(0)
    model = ScalaBLModel(LlamaForCausalLM(LlamaConfig(**small)).eval(), tiny.config_for())
    tiny.fill(model)
    batch, tokens = TokenBatch.of(tiny.ragged((4, 3))), 4
    parameters = sum(p.numel() for p in model.parameters())
    for num_samples in (1, 8, 32):
        with LargestTensor() as watch:
            model.logits(batch, model.draws(num_samples))
        rows = 2 * num_samples
        widest = max(rows * tokens * 256, rows * 4 * tokens * tokens)  # the MLP's activations; attention scores
        # A copy of one adapted weight per sample would be num_samples * 128 * 128 elements.
        assert watch.elements <= max(widest, 128 * 256)
        assert watch.elements < num_samples * 128 * 128 or num_samples == 1
        assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("targets", [("q_proj", "lm_head"), ("q_proj", "v_proj")], ids=["adapted", "not adapted"])
def test_tied_embeddings_stay_as_they_are(targets: tuple[str, ...]) -> None:
    base = tiny.base_model("llama")
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight
    before = base.get_input_embeddings().weight.clone()
    model = ScalaBLModel(base, tiny.config_for(target_modules=targets))
    tiny.fill(model)
    model.logits(TokenBatch.of(tiny.ragged()), model.draws(4))
    assert torch.equal(base.get_input_embeddings().weight, before)
    assert ("lm_head" in model.adapted) == ("lm_head" in targets)


@pytest.mark.parametrize("name", list(tiny.ARCHITECTURES))
def test_without_the_adapter_the_base_model_answers(name: str) -> None:
    model = tiny.adapted(name)
    choices = list(model.config.task.choice_tokens or ())
    plain = tiny.base_model(name)
    with torch.no_grad():
        expected = torch.stack([plain(torch.tensor([ids])).logits[0, -1, choices] for ids in tiny.ragged(LENGTHS)])
    assert (model.base_logits(TokenBatch.of(tiny.ragged(LENGTHS))) - expected).abs().max() <= 1e-5


def test_layers_to_transform_limits_the_decoder_layers_and_not_the_head() -> None:
    model = tiny.adapted(layers_to_transform=(1,))
    assert list(model.adapted) == ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "lm_head"]
    assert model.num_stochastic_parameters == 3 * 4


def test_a_whole_module_path_is_a_target() -> None:
    model = tiny.adapted(target_modules=("layers.0.self_attn.o_proj", "lm_head"))
    assert list(model.adapted) == ["model.layers.0.self_attn.o_proj", "lm_head"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ("q_proj", "w_pack")}, "target module 'w_pack' matches no linear layer of .* LlamaForCausalLM"),
        ({"target_modules": ("input_layernorm",)}, "target module 'input_layernorm' matches no linear layer"),
        ({"layers_to_transform": (0, 2)}, "layers_to_transform names layer 2, but the base model's layers are 0 to 1"),
        (
            {"layers_to_transform": (9,), "target_modules": ("q_proj",)},
            "names layer 9, but the base model's layers are 0 to 1",
        ),
        (
            {"layers_to_transform": (0, 1), "target_modules": ("layers.0.self_attn.q_proj",)},
            "layers_to_transform names layer 1, in which the base model has no target module",
        ),
        (
            {"task": tiny.CLASSIFICATION.model_copy(update={"choice_tokens": (5, 6, 259)})},
            "choice token 259 is outside the base model's vocabulary of 259",
        ),
    ],
)
def test_a_configuration_that_does_not_fit_the_base_model_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        ScalaBLModel(tiny.base_model(), tiny.config_for(**changes))


def test_a_task_whose_choice_tokens_are_not_resolved_is_refused() -> None:
    config = tiny.config_for().model_copy(update={"task": tiny.CLASSIFICATION})
    with pytest.raises(AdapterError, match=r"task\.choice_tokens is not set"):
        ScalaBLModel(tiny.base_model(), config)


def test_inputs_with_draws_of_their_own_share_a_pass_and_keep_their_answers() -> None:
    model, sequences = tiny.adapted(), tiny.ragged(LENGTHS)
    shared = model.draws(6, seed=1)
    draws = [shared, model.draws(3, seed=2), shared, model.draws(1, seed=9)]
    with _counted_calls(model) as calls:
        together = model.logits_each(TokenBatch.of(sequences), draws)
    assert set(calls.values()) == {1}
    assert [len(logits) for logits in together] == [6, 3, 6, 1]
    for sequence, each, logits in zip(sequences, draws, together, strict=True):
        assert (model.logits(TokenBatch.of([sequence]), each)[0] - logits).abs().max() <= 1e-5


def test_permuting_inputs_or_samples_permutes_the_logits_and_nothing_else() -> None:
    model, sequences = tiny.adapted(), tiny.ragged(LENGTHS)
    draws = model.draws(K)
    logits = model.logits(TokenBatch.of(sequences), draws)
    inputs, samples = torch.tensor([2, 0, 3, 1]), torch.tensor([4, 1, 0, 3, 2])
    moved = model.logits(TokenBatch.of([sequences[i] for i in inputs]), draws)
    assert (moved - logits[inputs]).abs().max() <= 1e-5
    other = Draws(draws.seed, draws.scheme, draws.epsilon[samples])
    assert (model.logits(TokenBatch.of(sequences), other) - logits[:, samples]).abs().max() <= 1e-5


def test_neighbours_and_padding_change_no_answer() -> None:
    model, (first, *others) = tiny.adapted(), tiny.ragged((5, 40, 2, 17))
    draws = model.draws(K)
    alone = model.logits(TokenBatch.of([first]), draws)[0]
    for row, batch in ((0, TokenBatch.of([first, *others])), (-1, _left_padded([*others, first]))):
        assert (model.logits(batch, draws)[row] - alone).abs().max() <= 1e-5


def test_what_stands_in_the_padding_never_reaches_an_answer() -> None:
    model, draws = tiny.adapted(), tiny.adapted().draws(K)
    batch = TokenBatch.of(tiny.ragged(LENGTHS))
    noisy = batch.input_ids.masked_fill(batch.attention_mask == 0, 200)
    assert torch.equal(model.logits(TokenBatch(noisy, batch.attention_mask), draws), model.logits(batch, draws))


def test_posterior_scale_scales_sigma_and_zero_is_the_mean() -> None:
    scaled, unscaled = tiny.adapted(posterior_scale=2.0), tiny.adapted()
    epsilon = unscaled.draws(K).epsilon
    with torch.no_grad():
        mean = unscaled.posterior().mean
        assert torch.allclose(scaled.sample(epsilon) - mean, 2 * (unscaled.sample(epsilon) - mean), atol=1e-6)
    batch, flat = TokenBatch.of(tiny.ragged()), tiny.adapted(posterior_scale=0.0)
    logits = flat.logits(batch, flat.draws(3))
    assert (logits - unscaled.logits(batch, unscaled.mean_draw())).abs().max() <= 1e-5


def test_an_untrained_adapter_changes_nothing() -> None:
    model = ScalaBLModel(tiny.base_model(), tiny.config_for())
    model.reset_adapter(seed=0)
    batch = TokenBatch.of(tiny.ragged())
    assert (model.logits(batch, model.draws(2))[:, 0] - model.base_logits(batch)).abs().max() <= 1e-6
    assert all(isinstance(layer, SubspaceLinear) for layer in model.adapted.values())


def test_batches_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one sequence"):
        TokenBatch.of([])
    with pytest.raises(ValueError, match="each sequence at least one token"):
        TokenBatch.of([[1], []])
    with pytest.raises(ValueError, match="a row without any token"):
        TokenBatch(torch.ones(2, 3, dtype=torch.int64), torch.tensor([[1, 1, 1], [0, 0, 0]])).right_padded()
    with pytest.raises(ValueError, match="1 draws were given for 2 inputs"):
        tiny.adapted().logits_each(TokenBatch.of([[1], [2]]), [tiny.adapted().draws(1)])
