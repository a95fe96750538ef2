"""Training with the posterior laplace: a MAP estimate without samples and sigma, then a fit; cut short, it ends the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scalabl.errors import FitError
from scalabl.evaluation.encoded import EncodedSet
from scalabl.files.adapter_directory import read_config, read_weights
from scalabl.model.token_batch import TokenBatch
from scalabl.training import posterior_fit, trainer
from scalabl.training.recipe import TrainingConfig
from scalabl.training.trainer import VariationalModule, train_adapter
from tests import tiny

RECIPE = TrainingConfig(recipe="map-laplace", max_steps=4, eval_steps=2, batch_size=8, fit_rows=12)
FACTOR = "posterior.covariance_factor"


def _rows(count: int, seed: int) -> EncodedSet:
    lengths = [2 + (5 * row) % 7 for row in range(count)]
    return EncodedSet(tiny.ragged(lengths, seed), torch.arange(count) % 3, torch.full((count,), 3), "rows.jsonl")


TRAIN, VALIDATION = _rows(24, 0), _rows(12, 1)


def _train(output: Path, recipe: TrainingConfig = RECIPE) -> dict[str, float]:
    return dict(train_adapter(tiny.base_model(), tiny.config_for(), recipe, TRAIN, VALIDATION, output).metrics)


def test_the_loss_is_that_of_the_mean_with_a_weight_decay() -> None:
    model = tiny.adapted(prior_std=2.0)
    for layer in model.adapted.values():
        layer.requires_grad_()
    module = VariationalModule(model, RECIPE, 100)
    ids, lengths = TokenBatch.of(tiny.ragged()).right_padded()
    labels, counts = torch.tensor([0, 1, 2, 0]), torch.full((4,), 3)
    first, second = (module(ids, lengths, counts, labels) for _ in range(2))
    assert torch.equal(first["loss"], second["loss"])
    z = model.logits(TokenBatch.of(tiny.ragged()), model.mean_draw())[:, 0]
    nll = torch.nn.functional.cross_entropy(z, labels)
    mean = torch.cat([layer.s_mean for layer in model.adapted.values()])
    expected = nll + (mean.detach() / 2).square().sum() / 2 / 100
    assert first["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    first["loss"].backward()
    for layer in model.adapted.values():
        assert layer.s_mean.grad is not None
        assert layer.s_log_std.grad is None or not layer.s_log_std.grad.any()


def test_a_fit_that_was_cut_short_ends_with_the_same_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _train(tmp_path / "whole")
    real = trainer.adapter_from

    class Cut(Exception):
        """Stands for a killed process."""

    def stop(*_: object) -> None:
        raise Cut

    monkeypatch.setattr(trainer, "adapter_from", stop)
    with pytest.raises(Cut):
        _train(tmp_path / "cut")
    assert (tmp_path / "cut" / "checkpoints" / "posterior_fit.safetensors").is_file()
    monkeypatch.setattr(trainer, "adapter_from", real)
    assert _train(tmp_path / "cut") == pytest.approx(whole)
    assert not (tmp_path / "cut" / "checkpoints" / "posterior_fit.safetensors").exists()
    one, two = (read_weights(tmp_path / name) for name in ("whole", "cut"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert FACTOR in one
    record = read_config(tmp_path / "whole").posterior_fit
    assert record is not None
    assert (record.rows, record.total_rows) == (12, 24)


def test_a_full_covariance_of_too_many_scalars_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(posterior_fit, "FULL_LIMIT", 10)
    with pytest.raises(FitError, match=r"20 scalars, .* add --fit-covariance diagonal"):
        _train(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("changes", [{"train_samples": 2}, {"kl_direction": "p_q"}, {"kl_optimizer": "sgd"}])
def test_options_of_sampling_do_not_go_with_it(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="posterior laplace trains without samples and without sigma; leave out"):
        TrainingConfig.model_validate({"recipe": "map-laplace", **changes})
