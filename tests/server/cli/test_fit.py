"""`scalabl fit` on real files: of an adapter, of a LoRA, resumed, refused; and `train --recipe map-laplace`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from scalabl_server.cli.main import app
from typer.testing import CliRunner, Result

from scalabl.files.adapter_directory import load_adapter, read_config, read_weights
from scalabl.model.token_batch import TokenBatch
from scalabl.training import curvature
from tests import tiny

FACTOR = "posterior.covariance_factor"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def said(result: Result) -> str:
    return " ".join(result.stderr.replace("│", " ").split())


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, an adapter for it, one of its samples as a LoRA, and data."""
    folder = tmp_path_factory.mktemp("work")
    tiny.write_base(folder / "base")
    tiny.write_adapter(folder / "adapter", posterior_scale=2.0, temperature=1.5)
    exported = run("export", "peft", "--adapter", folder / "adapter", "--model", folder / "base", "--num-samples", 1,
                   "--output", folder / "samples")  # fmt: skip
    assert exported.exit_code == 0, exported.output
    choices = list(tiny.CLASSIFICATION.choices)
    rows = [{"text": "xyz"[i % 3] * (1 + i % 5), "choices": choices, "answer": i % 3} for i in range(24)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def fit(work: Path, source: Path, *arguments: object) -> Result:
    return run("fit", source, "--data", work / "rows.jsonl", "--model", work / "base", *arguments)


def _mean_logits(adapter: Path) -> torch.Tensor:
    model = load_adapter(tiny.base_model(), adapter)
    return model.logits(TokenBatch.of(tiny.ragged()), model.mean_draw())[:, 0]


def test_an_adapter_is_fitted_where_it_is(work: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(work / "adapter", adapter)
    (adapter / "notes.txt").write_text("mine")
    before = _mean_logits(adapter)
    result = fit(work, adapter, "--max-rows", 20)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["covariance"], report["rows"], report["total_rows"]) == ("full", 20, 24)
    assert (report["precision_from"], report["prior_precision"]) == ("unit", 1.0)
    config = read_config(adapter)
    assert config.posterior_fit is not None
    assert config.posterior_fit.prior_precision == report["prior_precision"]
    assert (config.posterior_scale, config.temperature) == (1.0, 1.0)
    assert (_mean_logits(adapter) - before).abs().max() <= 1e-5
    assert FACTOR in read_weights(adapter)
    assert (adapter / "notes.txt").read_text() == "mine"
    assert not (adapter / "checkpoints").exists()
    again = fit(work, adapter, "--max-rows", 20)
    assert json.loads(again.stdout)["prior_precision"] == pytest.approx(report["prior_precision"], rel=1e-4)


def test_a_lora_becomes_a_fitted_adapter_in_one_command(work: Path, tmp_path: Path) -> None:
    output, template = tmp_path / "fitted", tiny.CLASSIFICATION.template
    options = ("--output", output, "--template", template, "--validation", work / "rows.jsonl", "--covariance", "diagonal",
               "--special-tokens-in-text", "control")  # fmt: skip
    result = fit(work, work / "samples" / "sample-0", *options)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["precision_from"] == "held_out"
    config = read_config(output)
    assert config.task == read_config(work / "adapter").task
    assert (config.covariance, config.format_version) == ("diagonal", 2)
    sampled = load_adapter(tiny.base_model(), work / "adapter")
    expected = sampled.logits(TokenBatch.of(tiny.ragged()), sampled.draws(1))[:, 0]
    assert (_mean_logits(output) - expected).abs().max() <= 1e-5


def test_a_fitted_adapter_calibrates_evaluates_and_exports(work: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "fitted"
    assert fit(work, work / "adapter", "--output", adapter).exit_code == 0
    common = ("--adapter", adapter, "--model", work / "base")
    calibrated = run(
        "calibrate", *common, "--data", work / "rows.jsonl", "--num-samples", 4, "--no-abstain", "--levels", 0.8
    )
    assert calibrated.exit_code == 0, calibrated.output
    config = read_config(adapter)
    assert config.calibration is not None
    assert config.covariance == "full"
    for method in ("monte_carlo", "linearized", "control_variate"):
        options = ("--data", work / "rows.jsonl", "--num-samples", 4, "--method", method, "--bootstrap", 0)
        result = run("evaluate", *common, *options)
        assert result.exit_code == 0, result.output
    exported = run("export", "peft", *common, "--num-samples", 3, "--output", tmp_path / "samples")
    assert exported.exit_code == 0, exported.output
    model = load_adapter(tiny.base_model(), adapter)
    s = model.sample(model.draws(3).epsilon)
    for index in range(3):
        tensors = read_weights(tmp_path / "samples" / f"sample-{index}")
        for columns, (name, layer) in zip(torch.split(s[index], 4), model.adapted.items(), strict=True):
            found = tensors[f"base_model.model.{name}.lora_A.weight"]
            assert torch.allclose(found, columns.unsqueeze(1) * layer.lora_A, atol=1e-6)


class Cut(BaseException):
    """Stands for a killed process."""


def test_a_fit_that_was_cut_short_is_resumed_by_the_same_command(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curvature, "BATCH_TOKENS", 40)
    monkeypatch.setattr(curvature, "SECONDS_BETWEEN_SAVES", 0.0)
    output, lora = tmp_path / "fitted", work / "samples" / "sample-0"
    batches, real = [], curvature._with_batch

    def counted(*arguments: object) -> curvature.Sums:
        batches.append(arguments)
        if len(batches) == 3:
            raise Cut
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(curvature, "_with_batch", counted)
    with pytest.raises(Cut):
        fit(work, lora, "--output", output)
    assert [str(path.relative_to(output)) for path in output.rglob("*.*")] == ["checkpoints/posterior_fit.safetensors"]
    other = fit(work, lora, "--output", output, "--seed", 1)
    assert other.exit_code == 1
    assert "is the state of another fit, with other options; choose another --output, or add --overwrite" in said(other)
    resumed = fit(work, lora, "--output", output)
    assert resumed.exit_code == 0, resumed.output
    whole = len(batches) - 1  # the third was cut, and done again
    batches[:] = [()] * 3
    assert fit(work, lora, "--output", tmp_path / "whole").exit_code == 0
    assert len(batches) - 3 == whole
    assert torch.equal(read_weights(output)[FACTOR], read_weights(tmp_path / "whole")[FACTOR])
    assert sorted(path.name for path in output.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ("samples/sample-0", (), "is a LoRA, which stays as it is; name another folder with --output"),
        ("samples/sample-0", ("--output", "{work}/adapter"), "is not empty; choose another --output, or add --overwrite"),
        ("samples", ("--output", "{work}/new"), "samples has no adapter_config.json"),
        ("adapter", ("--template", "{{input}}"), "is an adapter, which has its own; leave the option out"),
        ("adapter", ("--max-rows", "0"), "greater than or equal to 1"),
        ("adapter", ("--covariance", "banded"), "'full' or 'diagonal'"),
        ("adapter", ("--evidence", "--prior-precision", "1"), "evidence chooses the prior precision"),
    ],
)
def test_what_cannot_be_done_is_one_line(source: str, arguments: tuple[str, ...], message: str, work: Path) -> None:
    before = {path: path.read_bytes() for path in (work / "adapter").iterdir()}
    result = fit(work, work / source, *(part.format(work=work) for part in arguments))
    assert result.exit_code in (1, 2)
    assert message in said(result)
    assert isinstance(result.exception, SystemExit), result.exception
    assert {path: path.read_bytes() for path in (work / "adapter").iterdir()} == before
    assert not (work / "new").exists()


def test_the_recipe_map_laplace_trains_then_fits(work: Path, tmp_path: Path) -> None:
    data = ("--model", work / "base", "--train", work / "rows.jsonl", "--validation", work / "rows.jsonl")
    steps = ("--max-steps", 4, "--eval-steps", 2, "--r", 4, "--recipe", "map-laplace", "--fit-rows", 20)
    output = tmp_path / "trained"
    result = run("train", *data, *steps, "--output", output)
    assert result.exit_code == 0, result.output
    config = read_config(output)
    assert config.posterior_fit is not None
    assert (config.covariance, config.posterior_fit.rows) == ("full", 20)
    load_adapter(tiny.base_model(), output)
    assert run("train", *data, *steps, "--output", output).stdout.endswith("nothing was done\n")
    refused = run("train", *data, *steps, "--output", tmp_path / "other", "--train-samples", 2)
    assert refused.exit_code == 2
    assert "posterior laplace trains without samples" in said(refused)
