"""Stochastic variational inference on a tiny model: it learns, and a cut run resumes to the same end."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import TrainerState

from scalabl.evaluation.dataset import Example
from scalabl.evaluation.encoded import EncodedSet, encode_examples
from scalabl.evaluation.inference import logits_of, predictive_of
from scalabl.evaluation.scoring import scores
from scalabl.files.adapter_directory import load_adapter, read_config, read_weights
from scalabl.model.forward_pass import ForwardPass, RowSamples
from scalabl.model.posterior import kl_divergence
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.model.token_batch import TokenBatch
from scalabl.passes.probes import find_shared_work
from scalabl.passes.trunk_cache import trunk_cache
from scalabl.prompt import Prompter
from scalabl.training.published import KLSteps, cycle_length, kl_rate
from scalabl.training.recipe import TrainingConfig
from scalabl.training.run_folder import fingerprint_of
from scalabl.training.trainer import LengthGroupedSampler, VariationalModule, train_adapter
from tests import tiny

RECIPE = TrainingConfig(max_steps=60, batch_size=12, learning_rate=2e-2, eval_steps=20, eval_samples=4)


def _examples(count: int, seed: int) -> EncodedSet:
    """Words of one letter, three of them, which name the colour."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        answer = int(torch.randint(3, (1,), generator=generator))
        length = int(torch.randint(2, 7, (1,), generator=generator))
        rows.append(Example("xyz"[answer] * length, tiny.CLASSIFICATION.choices, answer, f"rows:{index}"))
    return encode_examples(Prompter(tiny.CLASSIFICATION, tiny.tokenizer()), rows)


TRAIN, VALIDATION = _examples(96, 0), _examples(48, 1)


def _train(output: Path, recipe: TrainingConfig = RECIPE, **config: Any) -> dict[str, float]:
    return dict(train_adapter(tiny.base_model(), tiny.config_for(**config), recipe, TRAIN, VALIDATION, output).metrics)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, float]]:
    output = tmp_path_factory.mktemp("trained")
    return output, _train(output)


def test_training_learns_the_task_and_writes_an_adapter_that_serves(trained: tuple[Path, dict[str, float]]) -> None:
    output, metrics = trained
    model = load_adapter(tiny.base_model(), output)
    draws = model.draws(16)
    outcome = predictive_of(logits_of(model, VALIDATION.sequences, draws), VALIDATION.num_choices, model, draws)
    assert scores(outcome, VALIDATION.answers)["accuracy"] >= 0.95
    assert metrics["eval_accuracy"] >= 0.95


def test_the_summary_counts_parameters_and_scores(trained: tuple[Path, dict[str, float]]) -> None:
    output, metrics = trained
    weights = read_weights(output)
    stochastic = sum(tensor.numel() for name, tensor in weights.items() if name.endswith("s_mean"))
    assert metrics["stochastic_parameters"] == stochastic == 4 * 5
    assert metrics["additional_parameters"] == sum(tensor.numel() for tensor in weights.values())
    assert {"eval_loss", "eval_ece", "eval_brier", "eval_mutual_information", "eval_median_sigma"} <= metrics.keys()


def test_the_kept_adapter_is_the_one_with_the_lowest_validation_loss(trained: tuple[Path, dict[str, float]]) -> None:
    output, metrics = trained
    (state,) = [json.loads(path.read_text()) for path in (output / "checkpoints").glob("checkpoint-60/trainer_state.json")]
    losses = [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]
    assert metrics["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


def test_a_run_cut_short_resumes_to_the_same_weights(
    trained: tuple[Path, dict[str, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    forward = VariationalModule.forward

    def cut(module: VariationalModule, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        if calls == 31:
            raise RuntimeError("power cut")
        return forward(module, *args, **kwargs)

    monkeypatch.setattr(VariationalModule, "forward", cut)
    with pytest.raises(RuntimeError, match="power cut"):
        _train(tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    metrics = _train(tmp_path)
    assert calls == 31 + 40, "it went on from the checkpoint of step 20"
    whole, resumed = read_weights(trained[0]), read_weights(tmp_path)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert metrics["eval_loss"] == trained[1]["eval_loss"]


def test_checkpoints_are_adapter_directories(trained: tuple[Path, dict[str, float]]) -> None:
    checkpoint = trained[0] / "checkpoints" / "checkpoint-60"
    assert read_config(checkpoint) == read_config(trained[0])
    assert load_adapter(tiny.base_model(), checkpoint).num_stochastic_parameters == 20


def test_the_loss_is_the_evidence_lower_bound_per_example() -> None:
    model = ScalaBLModel(tiny.base_model(), tiny.config_for(prior_std=0.7))
    tiny.fill(model)
    module = VariationalModule(model, RECIPE.model_copy(update={"kl_weight": 0.5}), num_examples=96)
    batch = TokenBatch.of(TRAIN.sequences[:5])
    ids, lengths = batch.right_padded()
    torch.manual_seed(3)
    terms = module(ids, lengths, TRAIN.num_choices[:5], TRAIN.answers[:5])
    torch.manual_seed(3)
    epsilon = torch.randn(5, model.num_stochastic_parameters)
    log_p = model.run(ForwardPass(ids, lengths, RowSamples(model.sample(epsilon), torch.arange(5)))).log_softmax(-1)
    nll = -log_p[torch.arange(5), TRAIN.answers[:5]].mean()
    posterior = model.posterior()
    kl = kl_divergence(posterior.mean, posterior.log_std, prior_std=0.7)
    assert terms["nll"].item() == pytest.approx(nll.item(), rel=1e-6)
    assert terms["loss"].item() == pytest.approx((nll + 0.5 * kl / 96).item(), rel=1e-6)


def test_every_adapter_parameter_and_nothing_else_gets_a_gradient() -> None:
    model = ScalaBLModel(tiny.base_model(), tiny.config_for())
    tiny.fill(model)
    ids, lengths = TokenBatch.of(TRAIN.sequences[:5]).right_padded()
    VariationalModule(model, RECIPE, 96)(ids, lengths, TRAIN.num_choices[:5], TRAIN.answers[:5])["loss"].backward()
    adapter = {id(parameter) for parameter in model.adapter_parameters().values()}
    for name, parameter in model.named_parameters():
        if id(parameter) in adapter:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name
        else:
            assert parameter.grad is None, name


def test_choices_that_an_example_does_not_have_take_no_part_in_its_loss() -> None:
    model = ScalaBLModel(tiny.base_model(), tiny.config_for(task=tiny.MULTIPLE_CHOICE))
    tiny.fill(model)
    ids, lengths = TokenBatch.of(tiny.ragged((6,))).right_padded()
    module = VariationalModule(model, RECIPE, 96)
    torch.manual_seed(0)
    two = module(ids, lengths, torch.tensor([2]), torch.tensor([1]))["nll"]
    torch.manual_seed(0)
    epsilon = torch.randn(1, model.num_stochastic_parameters)
    logits = model.run(ForwardPass(ids, lengths, RowSamples(model.sample(epsilon), torch.arange(1))))
    assert two.item() == pytest.approx(-logits[0, :2].log_softmax(-1)[1].item(), rel=1e-6)


def test_more_samples_per_example_lower_the_noise_of_the_loss() -> None:
    model = ScalaBLModel(tiny.base_model(), tiny.config_for())
    tiny.fill(model, sigma=0.5)
    ids, lengths = TokenBatch.of(TRAIN.sequences[:2]).right_padded()

    def spread(train_samples: int) -> float:
        module = VariationalModule(model, RECIPE.model_copy(update={"train_samples": train_samples}), 96)
        torch.manual_seed(0)
        with torch.no_grad():
            losses = [module(ids, lengths, TRAIN.num_choices[:2], TRAIN.answers[:2])["nll"].item() for _ in range(40)]
        return float(torch.tensor(losses).std())

    assert spread(16) < 0.5 * spread(1)


def test_a_strong_kl_weight_pulls_the_posterior_to_the_prior(tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"kl_weight": 500.0, "sigma_learning_rate": 0.1, "eval_steps": 60})
    metrics = _train(tmp_path, recipe, prior_std=0.4)
    assert metrics["eval_median_sigma"] == pytest.approx(0.4, rel=0.15)
    assert metrics["eval_median_abs_mu"] < 0.1


def test_early_stopping_ends_a_run_that_no_longer_improves(tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(
        update={"max_steps": 200, "eval_steps": 5, "learning_rate": 1e-30, "sigma_learning_rate": 1e-30,
                "early_stopping_patience": 1}
    )  # fmt: skip
    assert math.isfinite(_train(tmp_path, recipe)["eval_loss"])
    assert max(int(path.name.split("-")[1]) for path in (tmp_path / "checkpoints").iterdir()) <= 20


@given(st.lists(st.integers(1, 90), min_size=1, max_size=300), st.integers(1, 7), st.integers(0, 5))
def test_an_epoch_has_every_example_once_and_is_a_function_of_seed_and_epoch(
    lengths: list[int], batch_size: int, epoch: int
) -> None:
    sampler, twin = (LengthGroupedSampler(lengths, batch_size, seed=3) for _ in range(2))
    sampler.set_epoch(epoch)
    twin.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(len(lengths)))
    assert order == list(twin)


def test_batches_hold_examples_of_similar_length_and_epochs_differ() -> None:
    lengths = torch.randint(1, 100, (640,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = LengthGroupedSampler(lengths, 16, seed=0)
    order = list(sampler)
    spread = [max(batch) - min(batch) for batch in ([lengths[i] for i in order[k : k + 16]] for k in range(0, 640, 16))]
    assert sum(spread) / len(spread) < 5
    sampler.set_epoch(1)
    assert list(sampler) != order


def test_keeping_the_trunk_s_states_changes_no_step(tmp_path: Path) -> None:
    """The second layer alone is adapted, so that the first is trunk."""
    recipe = RECIPE.model_copy(update={"max_steps": 20, "train_samples": 2})
    _train(tmp_path / "kept", recipe, layers_to_transform=(1,))
    _train(tmp_path / "anew", recipe.model_copy(update={"trunk_cache_gib": 0.0}), layers_to_transform=(1,))
    kept, anew = read_weights(tmp_path / "kept"), read_weights(tmp_path / "anew")
    for name in kept:
        torch.testing.assert_close(kept[name], anew[name], rtol=1e-3, atol=1e-5)


def test_a_cache_beyond_its_limit_is_not_made() -> None:
    model = ScalaBLModel(tiny.base_model(), tiny.config_for(layers_to_transform=(1,)))
    tiny.fill(model)
    find_shared_work(model)
    tokens = sum(map(len, TRAIN.sequences))
    assert trunk_cache(model, TRAIN.sequences, tokens * 32 * 4 / 2**30) is not None
    assert trunk_cache(model, TRAIN.sequences, (tokens * 32 * 4 - 1) / 2**30) is None


def test_gradient_checkpointing_changes_no_step(tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"max_steps": 10})
    calls = {False: 0, True: 0}

    def count(checkpointing: bool) -> Callable[..., None]:
        def add(*_: Any) -> None:
            calls[checkpointing] += 1

        return add

    for checkpointing in calls:
        base = tiny.base_model()
        base.model.layers[0].self_attn.register_forward_pre_hook(count(checkpointing))
        update = {"gradient_checkpointing": checkpointing}
        output = tmp_path / str(checkpointing)
        train_adapter(base, tiny.config_for(), recipe.model_copy(update=update), TRAIN, VALIDATION, output)
    assert calls[True] == calls[False] + 10, "layers ran again in the backward passes"
    plain, again = read_weights(tmp_path / "False"), read_weights(tmp_path / "True")
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_tensorboard_logs_are_written_beside_the_adapter(tmp_path: Path) -> None:
    _train(tmp_path, RECIPE.model_copy(update={"max_steps": 20, "tensorboard": True}))
    logs = [EventAccumulator(str(log)).Reload() for log in (tmp_path / "runs").glob("events.out.tfevents.*")]
    scalars = {name for log in logs for name in log.Tags()["scalars"]}
    assert {"train/nll", "train/kl", "eval/loss", "eval/ece"} <= scalars


@pytest.mark.parametrize("state", [None, b'{"epoch": 1.25, "best'], ids=["absent", "cut"])
def test_a_checkpoint_that_was_not_written_to_its_end_is_passed_over(tmp_path: Path, state: bytes | None) -> None:
    recipe = RECIPE.model_copy(update={"max_steps": 40})
    _train(tmp_path, recipe)
    whole = read_weights(tmp_path)
    last = tmp_path / "checkpoints" / "checkpoint-40"
    (last / "trainer_state.json").unlink()
    if state is not None:
        (last / "trainer_state.json").write_bytes(state)
    (last / "adapter_model.safetensors").write_bytes(b"half")
    (tmp_path / "adapter_model.safetensors").unlink()  # as if the run had been cut in its last checkpoint
    _train(tmp_path, recipe)
    assert all(torch.equal(whole[name], tensor) for name, tensor in read_weights(tmp_path).items())


def test_the_published_recipe_is_a_set_of_defaults() -> None:
    published = TrainingConfig.model_validate({"recipe": "published", "kl_learning_rate": 0.02})
    assert (published.kl_direction, published.kl_optimizer, published.lr_schedule) == ("p_q", "sgd", "linear")
    assert TrainingConfig.model_validate({"recipe": "published", "kl_direction": "q_p"}).kl_direction == "q_p"
    assert TrainingConfig().kl_optimizer == "joint"


def test_the_published_kl_rate_follows_blob_s_cycle() -> None:
    recipe = TrainingConfig.model_validate({"recipe": "published", "max_steps": 1000, "batch_size": 4})
    length = cycle_length(640, 4)
    assert length == int(100 * 640 ** (math.pi / 8) / 4) == 316
    line = [step / 60 if step < 60 else (1000 - step) / 940 for step in range(1000)]
    denominator = 2 ** (length + 1) - 1
    expected = [0.2 * line[step] * (2 ** (step % length + 1) / denominator) for step in range(1000)]
    assert [kl_rate(step, recipe, 640) for step in range(1000)] == pytest.approx(expected, rel=1e-12)


def test_a_published_kl_step_is_plain_sgd_on_the_logarithms_of_mean_and_sigma() -> None:
    model = ScalaBLModel(tiny.base_model(), tiny.config_for(prior_std=0.8))
    tiny.fill(model)
    recipe = TrainingConfig.model_validate(
        {"recipe": "published", "max_steps": 10, "warmup_fraction": 0.0, "batch_size": 64}
    )
    layer = model.adapted["lm_head"]
    mean, log_std = layer.s_mean.detach().clone(), layer.s_log_std.detach().clone()
    log_abs = mean.abs().log().requires_grad_()
    log_std.requires_grad_()
    kl_divergence(mean.sign() * log_abs.exp(), log_std, 0.8, "p_q").backward()
    state = TrainerState()
    KLSteps(model, recipe, 3).on_optimizer_step(None, state, None)
    rate = kl_rate(0, recipe, 3)
    torch.testing.assert_close(layer.s_mean, mean.sign() * (log_abs - rate * log_abs.grad).exp().detach())
    torch.testing.assert_close(layer.s_log_std, (log_std - rate * log_std.grad).detach())


def test_with_the_published_kl_the_loss_is_the_likelihood_alone(tmp_path: Path) -> None:
    recipe = TrainingConfig.model_validate(RECIPE.model_dump(exclude_unset=True) | {"recipe": "published", "max_steps": 20})
    model = ScalaBLModel(tiny.base_model(), tiny.config_for())
    tiny.fill(model)
    ids, lengths = TokenBatch.of(TRAIN.sequences[:5]).right_padded()
    terms = VariationalModule(model, recipe, 96)(ids, lengths, TRAIN.num_choices[:5], TRAIN.answers[:5])
    assert terms["loss"].item() == terms["nll"].item()
    assert math.isfinite(_train(tmp_path, recipe)["eval_loss"])


@pytest.mark.parametrize("name", ["llama", "gpt2"])  # GPT-2's head is tied to its embeddings
def test_a_base_model_has_the_same_fingerprint_before_and_with_an_adapter(name: str) -> None:
    base = tiny.base_model(name)
    before = fingerprint_of(base)
    ScalaBLModel(base, tiny.config_for(name)).attach()
    assert fingerprint_of(base) == before == fingerprint_of(tiny.base_model(name))
    assert fingerprint_of(tiny.base_model(name, seed=1)) != before
    base.config.rms_norm_eps = 1e-3
    assert fingerprint_of(base) != before, "the configuration is part of it"
