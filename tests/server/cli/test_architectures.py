"""`train` and `evaluate` on base models and adapters of unusual kinds: exact, or one line that names the reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scalabl_server.cli.main import app
from typer.testing import CliRunner, Result

from scalabl.files.adapter_directory import read_config
from tests import tiny
from tests.architectures.tiny_types import tiny_config, tiny_model

COLOURS = list(tiny.CLASSIFICATION.choices)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, and a folder for base models."""
    folder = tmp_path_factory.mktemp("work")
    rows = [{"text": "xyz"[i % 3] * (1 + i % 5), "choices": COLOURS, "answer": i % 3} for i in range(12)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def _base(work: Path, kind: str) -> Path:
    folder = work / kind
    if not folder.exists():
        config = tiny_config(kind)
        config.get_text_config().vocab_size = 259
        tiny_model(config).save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
    return folder


def _train(work: Path, kind: str, output: Path, *arguments: object) -> Result:
    data = ("--train", work / "rows.jsonl", "--validation", work / "rows.jsonl", "--output", output)
    steps = ("--max-steps", 1, "--eval-steps", 1, "--r", 2)
    return run("train", "--model", _base(work, kind), *data, *steps, *arguments)


@pytest.mark.parametrize(
    ("kind", "targets", "expected"),
    [
        ("opt", "all-linear", ["k_proj", "v_proj", "q_proj", "out_proj", "fc1", "fc2"]),
        ("llama", r".*layers\.1\..*[qv]_proj", ["model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj"]),
        (
            "gemma3",
            "q_proj",
            ["model.language_model.layers.0.self_attn.q_proj", "model.language_model.layers.1.self_attn.q_proj"],
        ),
        ("bert", "query,value", ["query", "value"]),
    ],
)
def test_train_takes_what_peft_takes_as_target_modules(
    kind: str, targets: str, expected: list[str], work: Path, tmp_path: Path
) -> None:
    result = _train(work, kind, tmp_path / "new", "--target-modules", targets)
    assert result.exit_code == 0, result.output
    assert list(read_config(tmp_path / "new").target_modules) == expected
    assert result.stdout.count("eval_loss") >= 1


def test_a_pattern_chooses_the_layers_itself(work: Path, tmp_path: Path) -> None:
    result = _train(work, "llama", tmp_path / "new", "--target-modules", "all-linear", "--layers-to-transform", "1")
    assert result.exit_code == 2
    said = " ".join(result.stderr.replace("│", " ").split())
    assert "--layers-to-transform: --target-modules all-linear chooses the layers itself; leave this option out" in said


@pytest.mark.parametrize(
    ("kind", "targets", "message"),
    [
        (
            "mamba",
            "all-linear",
            "'backbone.layers.0.mixer.dt_proj' of the base model MambaForCausalLM is not called as a",
        ),
        (
            "llama",
            "q_proj|v_proj",
            "target_modules 'q_proj|v_proj' matches no linear layer of the base model Llama",
        ),
    ],
)
def test_train_refuses_what_cannot_be_served_by_name(
    kind: str, targets: str, message: str, work: Path, tmp_path: Path
) -> None:
    result = _train(work, kind, tmp_path / "new", "--target-modules", targets)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1].startswith(f"error: {message}")
    assert not (tmp_path / "new" / "adapter_config.json").exists()


def test_an_adapter_of_more_scalars_than_sobol_has_is_evaluated(work: Path, tmp_path: Path) -> None:
    tiny.write_base(tmp_path / "base")
    tiny.write_adapter(tmp_path / "adapter", r=5376, target_modules=("q_proj", "v_proj"))  # 4 layers: 21,504 scalars
    data = ("--data", work / "rows.jsonl", "--num-samples", 4, "--bootstrap", 0)
    result = run("evaluate", "--adapter", tmp_path / "adapter", "--model", tmp_path / "base", *data)
    assert result.exit_code == 0, result.output
