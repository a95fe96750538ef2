"""The `scalabl` command on real files: train, evaluate, info, convert; each error is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scalabl_server.cli.main import app
from typer.testing import CliRunner, Result

from scalabl.files.adapter_directory import read_config
from tests import tiny

COLOURS = list(tiny.CLASSIFICATION.choices)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _said(result: Result) -> str:
    """Standard error without the box that typer draws around it."""
    return " ".join(result.stderr.replace("│", " ").split())


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, an adapter for it, and data: texts whose words have one letter, which determines the colour."""
    folder = tmp_path_factory.mktemp("work")
    tiny.write_base(folder / "base")
    tiny.write_adapter(folder / "adapter")
    rows = [{"text": "xyz"[i % 3] * (1 + i % 5), "choices": COLOURS, "answer": i % 3} for i in range(24)]
    outside = [{"text": "?!" * (1 + i % 5), "choices": COLOURS, "answer": -1} for i in range(8)]
    lettered = [{"question": "xy"[i % 2], "choices": ["x", "y", "z"][: 2 + i % 2], "answer": i % 2} for i in range(12)]
    for name, each in (("rows", rows), ("outside", outside), ("lettered", lettered)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, each)))
    return folder


def _train(work: Path, output: Path, *arguments: object, rows: str = "rows.jsonl") -> Result:
    steps = ("--max-steps", 4, "--eval-steps", 2, "--r", 4)
    data = ("--train", work / rows, "--validation", work / rows, "--output", output)
    return run("train", "--model", work / "base", *data, *steps, *arguments)


def test_train_then_evaluate(work: Path, tmp_path: Path) -> None:
    trained = _train(work, tmp_path / "new", "--base-model-name", "tiny", "--template", "{input} is")
    assert trained.exit_code == 0, trained.output
    summary = json.loads(trained.stdout.splitlines()[-1])
    assert summary["stochastic_parameters"] == 20
    config = read_config(tmp_path / "new")
    assert (config.base_model_name_or_path, config.r, config.task.template) == ("tiny", 4, "{input} is")

    data = ("--data", work / "rows.jsonl", "--ood", work / "outside.jsonl", "--output", tmp_path / "report.json")
    drawn = ("--plots", tmp_path / "plots", "--bootstrap", 50)
    result = run("evaluate", "--adapter", tmp_path / "new", "--model", work / "base", *data, *drawn)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == json.loads(result.stdout)
    assert (report["num_samples"], report["data"]["inputs"], report["ood"][0]["inputs"]) == (16, 24, 8)
    assert 0 <= report["data"]["accuracy"] <= 1
    assert len(list((tmp_path / "plots").glob("*.png"))) == 3
    for row in ("accuracy", "ECE, class-wise", "AUROC of wrong answers, entropy", "95% interval", "24 inputs, 16 samples"):
        assert row in result.stderr
    assert {"auroc_ood_mutual_information", "auroc_ood_entropy", "auroc_ood_confidence"} <= report["ood"][0].keys()


@pytest.mark.parametrize("output", ["absent/report.json", "."])
def test_a_report_that_cannot_be_written_is_refused_before_the_evaluation(output: str, work: Path, tmp_path: Path) -> None:
    result = run("evaluate", "--adapter", work / "none", "--data", work / "none", "--output", tmp_path / output)
    assert result.exit_code == 2
    assert "--output: a file in an existing folder" in _said(result)


def test_train_multiple_choice_letters_the_widest_row(work: Path, tmp_path: Path) -> None:
    result = _train(work, tmp_path / "new", "--kind", "multiple_choice", rows="lettered.jsonl")
    assert result.exit_code == 0, result.output
    assert read_config(tmp_path / "new").task.choices == ("A", "B", "C")
    report = run("evaluate", "--adapter", tmp_path / "new", "--model", work / "base", "--data", work / "lettered.jsonl")
    assert json.loads(report.stdout)["data"]["inputs"] == 12


def test_train_options_reach_the_recipe_and_the_adapter(work: Path, tmp_path: Path) -> None:
    options = ("--layers-to-transform", "1", "--target-modules", "k_proj, lm_head", "--prior-std", 0.5, "--kl-weight", 0)
    assert _train(work, tmp_path / "new", *options).exit_code == 0
    config = read_config(tmp_path / "new")
    assert (config.layers_to_transform, config.target_modules, config.prior_std) == ((1,), ("k_proj", "lm_head"), 0.5)


def test_evaluating_twice_gives_the_same_numbers(work: Path) -> None:
    def scored(*arguments: object) -> dict[str, Any]:
        common = ("--adapter", work / "adapter", "--model", work / "base", "--data", work / "rows.jsonl")
        data = dict(json.loads(run("evaluate", *common, *arguments).stdout)["data"])
        assert data.pop("cost")["seconds_per_input"] > 0
        return data

    assert scored() == scored()
    assert scored()["nll"] != scored("--seed", 1)["nll"]
    many = scored("--num-samples", 64)["nll"]
    assert scored("--method", "linearized")["nll"] == pytest.approx(many, rel=0.1)
    assert scored("--method", "control_variate", "--num-samples", 8)["nll"] == pytest.approx(many, rel=0.05)


def test_a_mixture_is_evaluated_calibrated_and_described(work: Path, tmp_path: Path) -> None:
    folder = tiny.write_adapter(tmp_path / "mixture", **tiny.MIXTURE)
    common = ("--adapter", folder, "--model", work / "base", "--data", work / "rows.jsonl")
    few = run("evaluate", *common, "--num-samples", 2)
    assert few.exit_code == 1
    assert "error: num_samples is 2, and the adapter is a mixture of 3 members" in few.stderr
    scores = json.loads(run("evaluate", *common, "--num-samples", 6, "--method", "control_variate").stdout)
    assert scores["data"]["inputs"] == 24
    result = run("calibrate", *common, "--num-samples", 6, "--no-abstain", "--levels", "0.8")
    assert result.exit_code == 0, result.output
    config = read_config(folder)
    assert config.calibration is not None
    assert (config.members, config.format_version, config.calibration.num_samples) == (3, 2, 6)
    summary = json.loads(run("info", folder).stdout)
    assert (summary["members"], summary["adapted_layers"], summary["stochastic_parameters"]) == (3, 5, 60)


def test_info_needs_no_base_model(work: Path) -> None:
    summary = json.loads(run("info", work / "adapter").stdout)
    assert (summary["adapted_layers"], summary["stochastic_parameters"]) == (5, 20)
    assert summary["task"]["choices"] == COLOURS


LETTERS = ("--choices", "A", "--choices", "B")


def test_convert_writes_an_adapter(tmp_path: Path) -> None:
    key = "base_model.model.lm_head.lora_{}.default.{}"
    state = {key.format("A", name): torch.zeros(2) for name in ("log_s", "log_s_sigma")}
    state |= {key.format("A", "Vh"): torch.ones(2, 8), key.format("B", "weight"): torch.ones(2, 2)}
    torch.save(state, tmp_path / "state_dict.pt")
    common = (
        "--checkpoint",
        tmp_path / "state_dict.pt",
        "--base-model",
        "b",
        "--lora-alpha",
        4,
        "--output",
        tmp_path / "out",
    )
    result = run("convert", "bayesadapt", *common, *LETTERS, "--choice-tokens", "5,6")
    assert result.stdout == f"wrote {tmp_path / 'out'}: rank 2, target modules lm_head\n"
    assert read_config(tmp_path / "out").task.choice_tokens == (5, 6)

    wrong = run("convert", "bayesadapt", *common, *LETTERS, "--choice-tokens", "5,5")
    assert wrong.exit_code == 2
    assert "share the token 5" in _said(wrong)

    again = run("convert", "bayesadapt", *common, *LETTERS, "--choice-tokens", "7,8")
    remedy = "choose another --output, or add --overwrite to replace the adapter in it"
    assert (again.exit_code, again.stderr) == (1, f"error: {tmp_path / 'out'} is not empty; {remedy}\n")
    assert read_config(tmp_path / "out").task.choice_tokens == (5, 6)
    replaced = run("convert", "bayesadapt", *common, *LETTERS, "--choice-tokens", "7,8", "--overwrite")
    assert replaced.exit_code == 0, replaced.output
    assert read_config(tmp_path / "out").task.choice_tokens == (7, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--train", "absent.jsonl"), "error: absent.jsonl cannot be read"),
        (("--target-modules", "w_pack"), "error: target module 'w_pack' matches no linear layer"),
        (("--model", "no/where"), "error: the base model 'no/where' cannot be loaded"),
        (("--chat",), "error: task.chat is true but the tokenizer has no chat template"),
        (("--template", "no placeholder"), "no {input} placeholder"),
        (("--max-steps", "0"), "--max-steps"),
        (("--kl-direction", "up"), "--kl-direction"),
        (("--layers-to-transform", "first"), "--layers-to-transform"),
        (("--r", "0"), "--r"),
    ],
)
def test_a_wrong_option_is_a_message_and_not_a_traceback(
    arguments: tuple[str, ...], message: str, work: Path, tmp_path: Path
) -> None:
    result = _train(work, tmp_path / "new", *arguments)
    assert result.exit_code in (1, 2)
    assert message in _said(result)
    assert isinstance(result.exception, SystemExit), result.exception


def test_a_broken_adapter_is_one_line(tmp_path: Path) -> None:
    result = run("info", tmp_path)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {tmp_path} has no adapter_config.json")
    assert len(result.stderr.splitlines()) == 1
