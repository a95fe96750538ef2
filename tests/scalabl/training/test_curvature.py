"""The curvature of a data set against finite differences, and a computation that was cut short against a whole one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from scalabl.errors import OutputError
from scalabl.evaluation.encoded import EncodedSet
from scalabl.model.posterior import Draws
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.model.token_batch import TokenBatch
from scalabl.passes.probes import find_shared_work
from scalabl.training import curvature
from scalabl.training.curvature import SavedSums, sum_curvature
from tests import tiny

LENGTHS = (3, 9, 1, 14, 6, 2, 30, 5)
ROWS = torch.arange(len(LENGTHS))


def _rows(num_choices: int = 3) -> EncodedSet:
    count = len(LENGTHS)
    answers = torch.arange(count) % num_choices
    return EncodedSet(tiny.ragged(LENGTHS), answers, torch.full((count,), num_choices), "rows.jsonl")


def _slopes(model: ScalaBLModel, sequences: list[list[int]]) -> Tensor:
    """dz/ds at the mean by differences of sixth order, [N, C, P]."""
    size, step = model.num_stochastic_parameters, 0.02
    sigma = torch.cat([layer.s_log_std.exp() for layer in model.adapted.values()]).double().detach()
    slopes = torch.zeros(len(sequences), model.num_choices, size, dtype=torch.float64)
    for factor, weight in ((-3, -1), (-2, 9), (-1, -45), (1, 45), (2, -9), (3, 1)):
        draws = Draws(0, "gaussian", factor * step * torch.diag(1 / sigma.float()))
        z = model.logits(TokenBatch.of(sequences), draws).double()  # [N, P, C]
        slopes += weight * z.transpose(1, 2) / (60 * step)
    return slopes


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("num_choices", [3, 2])
def test_all_columns_give_the_gauss_newton_matrix(name: str, num_choices: int) -> None:
    model, rows = tiny.adapted(name), _rows(num_choices)
    slopes = _slopes(model, rows.sequences)[:, :num_choices]
    z = model.logits(TokenBatch.of(rows.sequences), model.mean_draw())[:, 0, :num_choices].double()
    p = torch.softmax(z, -1)
    fisher = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    expected = torch.einsum("ncp,ncd,ndq->pq", slopes, fisher, slopes)
    sums = sum_curvature(model, rows, ROWS, "full", exact=0)
    assert (sums.matrix[0] - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert sums.log_likelihood == pytest.approx(float(p.log().gather(1, rows.answers.unsqueeze(1)).sum()), rel=1e-5)
    diagonal = sum_curvature(model, rows, ROWS, "diagonal", exact=0)
    assert torch.allclose(diagonal.matrix[0], sums.matrix[0].diagonal())


def test_random_signs_give_it_on_average_with_fewer_passes() -> None:
    model, rows = tiny.adapted(), _rows()
    tiny.prefer(model, [0], by=3.0)
    exact = sum_curvature(model, rows, ROWS, "full", exact=0)
    found = [sum_curvature(model, rows, ROWS, "full", seed=seed, exact=1.0) for seed in range(60)]
    assert {sums.passes for sums in found} == {len(ROWS)}
    assert exact.passes == 2 * len(ROWS)
    scale = exact.matrix.abs().max()
    error = torch.stack([sums.matrix for sums in found]) - exact.matrix
    assert error.mean(0).abs().max() <= 0.1 * scale
    assert error.abs().amax((1, 2, 3)).median() >= 0.01 * scale


def test_a_trunk_that_runs_once_changes_nothing() -> None:
    rows = _rows()
    plain = tiny.adapted(layers_to_transform=(1,))
    shared = tiny.adapted(layers_to_transform=(1,))
    find_shared_work(shared)
    assert shared.trunk.has_states
    assert not plain.trunk.has_states
    matrices = [sum_curvature(model, rows, ROWS, "full").matrix for model in (plain, shared)]
    assert torch.allclose(*matrices, rtol=1e-4, atol=1e-6 * float(matrices[0].max()))


class Cut(Exception):
    """Stands for a killed process."""


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curvature, "BATCH_TOKENS", 12)
    monkeypatch.setattr(curvature, "SECONDS_BETWEEN_SAVES", 0.0)


@pytest.mark.usefixtures("small_batches")
def test_a_computation_that_was_cut_short_goes_on_to_the_same_sums(tmp_path: Path) -> None:
    model, rows, path = tiny.adapted(), _rows(), tmp_path / "checkpoints" / "state.safetensors"
    whole = sum_curvature(model, rows, ROWS, "full")
    seen: list[int] = []

    def stop(count: int) -> None:
        seen.append(count)
        if len(seen) == 3:
            raise Cut

    with pytest.raises(Cut):
        sum_curvature(model, rows, ROWS, "full", saved=SavedSums(path, {"rows": "a"}), on_progress=stop)
    again: list[int] = []
    sums = sum_curvature(model, rows, ROWS, "full", saved=SavedSums(path, {"rows": "a"}), on_progress=again.append)
    assert torch.equal(sums.matrix, whole.matrix)
    assert (sums.log_likelihood, sums.passes) == (whole.log_likelihood, whole.passes)
    assert again[0] == sum(seen)
    assert sum(again) == len(ROWS)


@pytest.mark.usefixtures("small_batches")
def test_the_state_of_another_computation_is_refused_by_what_differs(tmp_path: Path) -> None:
    path, sums = tmp_path / "state.safetensors", curvature.Sums(torch.zeros(1, 2))
    SavedSums(path, {"rows": "a", "adapter": "b", "options": "c"}).write(1, sums)
    other = SavedSums(path, {"rows": "A", "adapter": "b", "options": "C"})
    with pytest.raises(OutputError, match=r"with other rows and options; choose another --output, or add --overwrite"):
        other.read()
    path.write_bytes(b"something else")
    with pytest.raises(OutputError, match="cannot be read as the state of a fit"):
        other.read()
    other.remove()
    assert other.read() is None
