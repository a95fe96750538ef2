"""Novelty on the command line: `train` writes the reference, `calibrate` its p-values, `evaluate` says what it is worth."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from scalabl_server.cli.main import app
from typer.testing import CliRunner, Result

from scalabl.files.adapter_directory import read_config, read_weights
from scalabl.files.novelty_file import read_novelty
from scalabl.uncertainty.novelty import NoveltyReference
from tests import tiny

COLOURS = list(tiny.CLASSIFICATION.choices)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def write(path: Path, count: int, words: str, answer: int | None = None) -> Path:
    rows = [
        {"text": words[i % len(words)] * (1 + i % 5), "choices": COLOURS, "answer": i % 3 if answer is None else answer}
        for i in range(count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def reference_of(folder: Path) -> NoveltyReference:
    reference = read_novelty(folder, read_config(folder), 32)
    assert reference is not None
    return reference


@pytest.fixture(scope="module")
def work(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and a trained adapter in `run`."""
    folder = tmp_path_factory.mktemp("novelty")
    write(folder / "train.jsonl", 30, "xyz")
    write(folder / "held-out.jsonl", 40, "xyz")
    write(folder / "elsewhere.jsonl", 20, "?!#", answer=-1)
    data = ("--train", folder / "train.jsonl", "--validation", folder / "held-out.jsonl", "--novelty-rows", 20)
    steps = ("--max-steps", 2, "--eval-steps", 2, "--r", 4)
    trained = run("train", "--model", folders / "base", "--output", folder / "run", *data, *steps)
    assert trained.exit_code == 0, trained.output
    return folder


def calibrate(folders: Path, work: Path, adapter: Path, *arguments: object) -> Result:
    data = ("--data", work / "held-out.jsonl", "--num-samples", 4, "--no-abstain")
    return run("calibrate", "--adapter", adapter, "--model", folders / "base", *data, *arguments)


def test_training_writes_a_reference_of_at_most_so_many_rows(work: Path) -> None:
    config = read_config(work / "run")
    assert config.novelty is not None
    assert (config.format_version, config.novelty.rows, config.novelty.data.name) == (2, 20, "train.jsonl")
    assert (config.novelty.data.rows, config.novelty.calibration) == (30, None)
    reference = reference_of(work / "run")
    assert reference.rows.shape == (20, config.novelty.components)
    assert reference.calibration is None


def test_training_can_leave_it_out(work: Path, folders: Path, tmp_path: Path) -> None:
    data = ("--train", work / "train.jsonl", "--validation", work / "held-out.jsonl", "--no-novelty")
    steps = ("--max-steps", 1, "--eval-steps", 1, "--r", 4)
    trained = run("train", "--model", folders / "base", "--output", tmp_path / "run", *data, *steps)
    assert trained.exit_code == 0, trained.output
    assert not (tmp_path / "run" / "novelty.safetensors").exists()
    assert "novelty" not in json.loads((tmp_path / "run" / "adapter_config.json").read_text())


def test_calibrating_gives_p_values_and_a_level(work: Path, folders: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "run", tmp_path / "run")
    before = reference_of(tmp_path / "run")
    result = calibrate(folders, work, tmp_path / "run", "--novelty-level", 0.1)
    assert result.exit_code == 0, result.output
    config = read_config(tmp_path / "run")
    assert config.calibration is not None
    assert config.novelty is not None
    found = config.novelty.calibration
    assert found is not None
    assert (found.level, found.data.rows, found.num_samples) == (0.1, 40, 4)
    assert json.loads(result.stdout)["novelty"] == config.novelty.model_dump(mode="json")
    after = reference_of(tmp_path / "run")
    assert (after.rows == before.rows).all()
    assert after.calibration is not None
    assert len(after.calibration) == 40


def test_an_adapter_without_a_reference_gets_one_from_its_training_rows(work: Path, folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "colours", tmp_path / "colours")
    assert "has no novelty reference" in calibrate(folders, work, tmp_path / "colours", "--novelty-only").output
    arguments = ("--reference", work / "train.jsonl", "--novelty-only")
    result = calibrate(folders, work, tmp_path / "colours", *arguments)
    assert result.exit_code == 0, result.output
    config, before = read_config(tmp_path / "colours"), read_config(folders / "colours")
    assert config.with_novelty(None) == before, "scale, temperature and thresholds stay"
    assert len(reference_of(tmp_path / "colours").rows) == 30
    assert read_weights(tmp_path / "colours").keys() == read_weights(folders / "colours").keys()
    (tmp_path / "colours" / "novelty.safetensors").write_bytes(b"broken")
    assert "is not a safetensors file" in calibrate(folders, work, tmp_path / "colours", "--novelty-only").output
    assert calibrate(folders, work, tmp_path / "colours", *arguments).exit_code == 0, "a broken one is made again"


@pytest.mark.parametrize("is_in_place", [True, False])
def test_a_fitted_posterior_does_not_keep_the_reference_of_the_former_one(
    is_in_place: bool, work: Path, folders: Path, tmp_path: Path
) -> None:
    shutil.copytree(work / "run", tmp_path / "old")
    output = tmp_path / ("old" if is_in_place else "new")
    data = ("--data", work / "train.jsonl", "--model", folders / "base", "--output", output)
    result = run("fit", tmp_path / "old", *data)
    assert result.exit_code == 0, result.output
    assert "the novelty reference was made for the former posterior and is gone" in result.stderr
    assert read_config(output).novelty is None
    assert not (output / "novelty.safetensors").exists()
    assert calibrate(folders, work, output, "--reference", work / "train.jsonl").exit_code == 0
    assert len(reference_of(output).rows) == 30


def test_too_few_rows_for_a_level_are_refused_before_any_pass(work: Path, folders: Path) -> None:
    result = calibrate(folders, work, work / "run", "--novelty-level", 0.01)
    assert result.exit_code == 1
    assert "a novelty level of 0.01 needs at least 99 held-out rows and there are 40" in result.output


@pytest.mark.parametrize("method", ["monte_carlo", "linearized", "control_variate"])
def test_evaluating_says_how_well_it_detects_and_keeps_its_promise(
    work: Path, folders: Path, tmp_path: Path, method: str
) -> None:
    shutil.copytree(folders / "colours", tmp_path / "colours")
    made = calibrate(folders, work, tmp_path / "colours", "--reference", work / "train.jsonl", "--novelty-only")
    assert made.exit_code == 0, made.output
    result = run(
        "evaluate", "--adapter", tmp_path / "colours", "--model", folders / "base", "--data", work / "held-out.jsonl",
        "--ood", work / "elsewhere.jsonl", "--num-samples", 4, "--bootstrap", 20, "--method", method,
        "--output", tmp_path / "report.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report: dict[str, Any] = json.loads((tmp_path / "report.json").read_text())
    (elsewhere,) = report["ood"]
    assert 0 <= elsewhere["auroc_ood_novelty"] <= 1
    assert 0 <= elsewhere["fpr95_ood_novelty"] <= 1
    assert "auroc_ood_novelty" in elsewhere["intervals"]
    inside = report["data"]["novelty"]
    assert inside["level"] == 0.05
    assert inside["novel"] == inside["p_value_at_most"]["0.05"] <= 0.05 + 1 / 40
    assert report["data"]["abstention"]["answered"] == pytest.approx(1 - inside["novel"])
    assert elsewhere["abstention"]["answered"] == pytest.approx(1 - elsewhere["novelty"]["novel"])
    assert "AUROC, novelty" in result.stderr
    assert "novelty p-value at most 0.05" in result.stderr
