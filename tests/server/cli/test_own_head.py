"""Heads that come with the adapter, through the commands and the server: converted from PEFT, or trained from fresh rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fastapi.testclient import TestClient
from safetensors.torch import load_file
from scalabl_server.cli.main import app
from torch import Tensor
from typer.testing import CliRunner, Result

from scalabl.files.adapter_directory import read_config
from tests import tiny
from tests.scalabl.files.peft_reference import PEFT_WARNINGS, trained_classifier

pytestmark = PEFT_WARNINGS

TEXTS = ("a rose", "the sky is wide and", "xxxxxxxxxxxxxxxxx", "b", "grass grows in the rain")
CLASSES = (0, 1, 2, 1, 0)
LABELS = ("17", "17b", "none, other")  # their words mean nothing, and the first begins the second


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    tiny.write_base(folder / "base")
    rows = [{"text": text, "label": LABELS[label]} for text, label in zip(TEXTS, CLASSES, strict=True)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "labels.txt").write_text("\n".join(LABELS))
    return folder


@pytest.fixture(scope="module")
def expected(work: Path) -> Tensor:
    """PEFT's probabilities of the texts; its LoRA is in `lora`, the adapter made of it in `adapter`."""
    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    alone, _ = trained_classifier(work / "base", work / "lora", tiny.tokenizer(), TEXTS, CLASSES, **settings)
    result = run("convert", "peft", "--peft", work / "lora", "--model", work / "base", "--labels", work / "labels.txt",
                 "--relative-sigma", 1e-6, "--output", work / "adapter")  # fmt: skip
    assert result.exit_code == 0, result.output
    return alone


def test_a_converted_classifier_is_served_and_answers_as_in_peft(
    work: Path, expected: Tensor, serve: Callable[..., TestClient]
) -> None:
    client = serve(adapter=str(work / "adapter"))
    together = client.post("/predict", json={"inputs": list(TEXTS)}).json()["predictions"]
    alone = [client.post("/predict", json={"inputs": text}).json()["predictions"][0] for text in TEXTS]
    linearized = client.post("/predict", json={"inputs": list(TEXTS), "method": "linearized"}).json()["predictions"]
    for predictions in (together, alone, linearized):
        answered = torch.tensor([[p["probabilities"][label] for label in LABELS] for p in predictions])
        assert (answered - expected).abs().max() <= 1e-5
    assert client.get("/info").json()["adapters"][0]["choices"] == list(LABELS)


def test_a_converted_classifier_is_evaluated_on_rows_with_labels(work: Path, expected: Tensor) -> None:
    result = run("evaluate", "--adapter", work / "adapter", "--model", work / "base", "--data", work / "rows.jsonl",
                 "--num-samples", 2, "--bootstrap", 0)  # fmt: skip
    assert result.exit_code == 0, result.output
    right = expected.argmax(-1) == torch.tensor(CLASSES)
    nll = -expected[torch.arange(len(CLASSES)), torch.tensor(CLASSES)].log().mean()
    scores = json.loads(result.stdout)["data"]
    assert scores["accuracy"] == pytest.approx(float(right.float().mean()))
    assert scores["nll"] == pytest.approx(float(nll), abs=1e-5)


def test_classes_without_names_must_be_named(work: Path, expected: Tensor, tmp_path: Path) -> None:
    lora = ("--peft", work / "lora", "--model", work / "base", "--output", tmp_path / "new")
    unnamed = run("convert", "peft", *lora)
    assert (unnamed.exit_code, "--label" in unnamed.stderr) == (2, True)
    few = run("convert", "peft", *lora, "--label", "a", "--label", "b")
    assert few.exit_code == 1
    assert "the head 'score' of the LoRA is [3, 32]" in few.stderr
    assert not (tmp_path / "new").exists()


def _train(work: Path, output: Path, *arguments: object) -> Result:
    data = ("--model", work / "base", "--train", work / "rows.jsonl", "--validation", work / "rows.jsonl")
    return run("train", *data, "--output", output, "--eval-steps", 20, "--batch-size", 5, *arguments)


def test_fresh_rows_are_trained_with_the_adapter(work: Path, tmp_path: Path) -> None:
    result = _train(work, tmp_path / "new", "--head", "fresh", "--max-steps", 30, "--learning-rate", 2e-2,
                    "--head-learning-rate", 5e-2)  # fmt: skip
    assert result.exit_code == 0, result.output
    task = read_config(tmp_path / "new").task
    assert (task.head, task.choices, task.choice_tokens) == ("own", LABELS, None)
    assert json.loads(result.stdout.splitlines()[-1])["eval_accuracy"] == 1.0
    shown = run("info", tmp_path / "new")
    assert json.loads(shown.stdout)["format_version"] == 2


def test_the_learning_rate_of_fresh_rows_is_their_own(work: Path, tmp_path: Path) -> None:
    still = ("--head", "fresh", "--max-steps", 2, "--learning-rate", 1e-3)
    heads = []
    for output, rate in (("first", 1e-9), ("second", 1e-1)):
        assert _train(work, tmp_path / output, *still, "--head-learning-rate", rate).exit_code == 0
        heads.append(load_file(tmp_path / output / "adapter_model.safetensors")["head.weight"])
    assert 0.015 < float(heads[0].std()) < 0.025  # N(0, 0.02^2), as it began
    assert float((heads[1] - heads[0]).abs().max()) > 0.05


def test_training_starts_from_a_classifier_with_its_head(work: Path, expected: Tensor, tmp_path: Path) -> None:
    still = ("--init-from", work / "lora", "--max-steps", 1, "--learning-rate", 1e-9, "--head-learning-rate", 1e-9)
    plain = _train(work, tmp_path / "new", *still, "--labels", work / "labels.txt")
    assert (plain.exit_code, "start with --head fresh to keep it" in plain.stderr) == (1, True)
    unnamed = _train(work, tmp_path / "new", *still, "--head", "fresh")
    assert (unnamed.exit_code, "name the classes" in " ".join(unnamed.stderr.split())) == (2, True)
    result = _train(work, tmp_path / "new", *still, "--head", "fresh", "--labels", work / "labels.txt")
    assert result.exit_code == 0, result.output
    theirs = load_file(work / "lora" / "adapter_model.safetensors")["base_model.model.score.weight"]
    ours = load_file(tmp_path / "new" / "adapter_model.safetensors")["head.weight"]
    assert torch.allclose(ours, theirs, atol=1e-6)


def test_a_run_with_another_head_is_another_run(work: Path, tmp_path: Path) -> None:
    assert _train(work, tmp_path / "new", "--head", "fresh", "--max-steps", 1).exit_code == 0
    result = _train(work, tmp_path / "new", "--max-steps", 1)
    assert result.exit_code == 1
    assert 'head was "own" and is now "vocabulary"' in result.stderr


def test_fresh_rows_are_for_a_fixed_set_of_choices(work: Path, tmp_path: Path) -> None:
    row = {"text": "x", "choices": ["a", "b"], "answer": 0}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    data = ("--train", tmp_path / "rows.jsonl", "--validation", tmp_path / "rows.jsonl")
    result = run("train", "--model", work / "base", *data, "--output", tmp_path / "new", "--head", "fresh",
                 "--kind", "multiple_choice")  # fmt: skip
    assert result.exit_code == 2
    assert "head is 'own', which is for classification" in " ".join(result.stderr.replace("│", " ").split())
