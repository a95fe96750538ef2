"""`scalabl train --members`: runs with seeds of their own that share the trunk, resume, and become one adapter."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import scalabl.training.members
from scalabl.files.adapter_directory import read_config, read_weights
from scalabl.passes.trunk_cache import TrunkCache
from scalabl.training.trainer import VariationalModule
from tests import tiny
from tests.server.cli.test_train_again import content, train, write_rows

LAST_LAYER = ("--layers-to-transform", 1)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, data, a finished mixture and single trainings with the seeds of its members."""
    folder = tmp_path_factory.mktemp("members")
    tiny.write_base(folder / "base")
    write_rows(folder / "rows.jsonl")
    write_rows(folder / "validation.jsonl", count=12)
    with pytest.MonkeyPatch.context() as patch:
        made: list[int] = []
        real = TrunkCache.__init__

        def count(self: TrunkCache, *arguments: object) -> None:
            made.append(1)
            real(self, *arguments)  # type: ignore[arg-type]  # passed on as they are

        patch.setattr(TrunkCache, "__init__", count)
        result = train(folder, folder / "mixture", "--members", 2, "--seed", 3, *LAST_LAYER)
    assert result.exit_code == 0, result.output
    assert len(made) == 2, "one cache for each set of rows, whatever the number of members"
    assert f"member 2 of 2: {folder / 'mixture' / 'members' / '1'}" in result.stderr
    (folder / "metrics.json").write_text(result.stdout.splitlines()[-1])
    for seed in (3, 4):
        assert train(folder, folder / f"seed-{seed}", "--seed", seed, *LAST_LAYER).exit_code == 0
    return folder


def test_members_are_the_trainings_with_their_seeds(work: Path) -> None:
    config, weights = read_config(work / "mixture"), read_weights(work / "mixture")
    assert (config.members, config.format_version) == (2, 2)
    for member, seed in enumerate((3, 4)):
        alone = read_weights(work / f"seed-{seed}")
        assert all(torch.allclose(weights[name][member], tensor, atol=1e-6) for name, tensor in alone.items())
    metrics = json.loads((work / "metrics.json").read_text())
    assert {"eval_loss", "eval_accuracy", "member_0_eval_loss", "member_1_eval_loss"} <= metrics.keys()
    assert metrics["stochastic_parameters"] == 2 * 3 * 4


def test_a_finished_mixture_is_left_alone_and_another_number_of_members_refused(work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "mixture", tmp_path / "run")
    before = content(tmp_path / "run")
    again = train(work, tmp_path / "run", "--members", 2, "--seed", 3, *LAST_LAYER)
    assert again.stdout.endswith("nothing was done\n"), again.output
    other = train(work, tmp_path / "run", "--members", 3, "--seed", 3, *LAST_LAYER)
    assert "holds another training run: members was 2 and is now 3" in other.stderr
    single = train(work, tmp_path / "run", "--seed", 3, *LAST_LAYER)
    assert "members was 2 and is now 1" in single.stderr
    assert content(tmp_path / "run") == before
    fewer = train(work, tmp_path / "run", "--seed", 3, "--overwrite", *LAST_LAYER)
    assert fewer.exit_code == 0, fewer.output
    assert not list((tmp_path / "run" / "members").glob("*"))
    assert read_config(tmp_path / "run").members == 1


def test_a_cut_mixture_resumes_its_members(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[int] = []
    real = VariationalModule.forward

    def forward(self: VariationalModule, *arguments: torch.Tensor, **more: torch.Tensor) -> dict[str, torch.Tensor]:
        steps.append(1)
        if len(steps) == 7:  # the second member's third step, after its first checkpoint
            raise RuntimeError("cut")
        return real(self, *arguments, **more)

    monkeypatch.setattr(VariationalModule, "forward", forward)
    options = ("--members", 2, "--seed", 3, *LAST_LAYER)
    assert "cut" in train(work, tmp_path / "run", *options).stderr
    assert not (tmp_path / "run" / "adapter_config.json").exists()
    resumed = train(work, tmp_path / "run", *options)
    assert resumed.exit_code == 0, resumed.output
    assert len(steps) == 4 + 2 + 1 + 2, "four steps of the first member, and two of the second before and after the cut"
    found, expected = read_weights(tmp_path / "run"), read_weights(work / "mixture")
    assert all(torch.allclose(tensor, expected[name], atol=1e-6) for name, tensor in found.items())


def test_the_combination_alone_is_made_up_for(work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("cut")

    options = ("--members", 2, "--seed", 3, *LAST_LAYER)
    with monkeypatch.context() as patch:
        patch.setattr(scalabl.training.members, "mixture_of", broken)
        assert "cut" in train(work, tmp_path / "run", *options).stderr
    monkeypatch.setattr(VariationalModule, "forward", broken)
    assert train(work, tmp_path / "run", *options).exit_code == 0
