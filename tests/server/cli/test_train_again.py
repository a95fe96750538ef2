"""`scalabl train` into a folder that a training has used: resumed, finished, refused with what differs, or overwritten."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from scalabl_server.cli.main import app
from torch import Tensor
from typer.testing import CliRunner, Result

from scalabl.files.adapter_directory import read_config, read_weights, save_config
from scalabl.training.trainer import VariationalModule
from tests import tiny

COLOURS = tuple(tiny.CLASSIFICATION.choices)
REMEDY = "choose another --output, or add --overwrite to start anew"


def write_rows(path: Path, choices: Sequence[str] = COLOURS, shift: int = 0, count: int = 24) -> Path:
    rows = [{"text": "xyz"[i % 3] * (1 + i % 5), "choices": choices, "answer": (i + shift) % 3} for i in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def train(work: Path, output: Path, *arguments: object, model: str = "base", rows: str = "rows.jsonl") -> Result:
    common = ("train", "--model", work / model, "--base-model-name", "tiny", "--output", output)
    data = ("--train", work / rows, "--validation", work / "validation.jsonl")
    steps = ("--max-steps", 4, "--eval-steps", 2, "--r", 4)
    return CliRunner().invoke(app, [str(argument) for argument in (*common, *data, *steps, *arguments)])


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two base models of the same shape, two LoRAs, data, and a finished training."""
    folder = tmp_path_factory.mktemp("work")
    tiny.write_base(folder / "base")
    other = tiny.base_model(seed=1)
    other.save_pretrained(folder / "other")
    tiny.tokenizer().save_pretrained(folder / "other")
    write_rows(folder / "rows.jsonl")
    write_rows(folder / "validation.jsonl", count=12)
    write_rows(folder / "shifted.jsonl", shift=1)
    write_rows(folder / "more.jsonl", count=30)
    first = train(folder, folder / "run")
    assert first.exit_code == 0, first.output
    return folder


@pytest.fixture
def used(work: Path, tmp_path: Path) -> Path:
    """The finished training's folder, which a test may change."""
    shutil.copytree(work / "run", tmp_path / "run")
    return tmp_path / "run"


def test_the_same_run_says_that_it_is_finished_and_rewrites_nothing(work: Path, used: Path) -> None:
    before = content(used)
    again = train(work, used)
    assert (again.exit_code, again.stdout) == (0, f"{used} holds this run's finished adapter; nothing was done\n")
    assert content(used) == before


def test_how_a_run_is_computed_does_not_make_it_another(work: Path, used: Path) -> None:
    again = train(work, used, "--gradient-checkpointing", "--trunk-cache-gib", 0)
    assert again.stdout.endswith("nothing was done\n"), again.output


def test_a_base_model_may_move_to_another_folder(work: Path, used: Path) -> None:
    shutil.copytree(work / "base", used.parent / "moved")
    again = train(work, used, model=str(used.parent / "moved"))
    assert again.stdout.endswith("nothing was done\n"), again.output


def refused(result: Result, folder: Path, before: dict[str, bytes]) -> str:
    """The differences that the one line of a refusal names; nothing was written."""
    assert result.exit_code == 1, result.output
    beginning, end = f"error: {folder} holds another training run: ", f"; {REMEDY}\n"
    message = result.stderr.splitlines(keepends=True)[-1]  # progress bars may come before it
    assert message.startswith(beginning)
    assert message.endswith(end)
    assert result.stdout == ""
    assert content(folder) == before
    return message.removeprefix(beginning).removesuffix(end)


@pytest.mark.parametrize(
    ("arguments", "difference"),
    [
        (("--special-tokens-in-text", "control"), 'special_tokens_in_text was "text" and is now "control"'),
        (("--learning-rate", 0.5), "learning_rate was 0.002 and is now 0.5"),
        (("--lora-alpha", 8), "lora_alpha was 16.0 and is now 8.0"),
        (("--seed", 7), "seed was 0 and is now 7"),
        (("--r", 2), "r was 4 and is now 2"),
        (("--max-steps", 6), "max_steps was 4 and is now 6"),
        (("--prior-std", 0.5), "prior_std was 1.0 and is now 0.5"),
        (("--target-modules", "lm_head"), 'target_modules was ["q_proj", "v_proj", "lm_head"] and is now ["lm_head"]'),
        (("--template", "{input}\nColour:"), 'template was "{input}\\nLabel:" and is now "{input}\\nColour:"'),
        (("--base-model-name", "other"), 'base_model_name_or_path was "tiny" and is now "other"'),
        (("--seed", 7, "--kl-weight", 2), "kl_weight was 1.0 and is now 2.0; seed was 0 and is now 7"),
        (
            ("--recipe", "published"),
            'recipe was "elbo" and is now "published"; sigma_learning_rate was 0.01 and is now 0.002; '
            'lr_schedule was "cosine" and is now "linear"; kl_direction was "q_p" and is now "p_q"; '
            'kl_optimizer was "joint" and is now "sgd"',
        ),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_other_options_are_refused_by_name_with_both_values(
    arguments: tuple[object, ...], difference: str, work: Path, used: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("the base model's weights were loaded")

    monkeypatch.setattr("scalabl.base.pretrained.load_pretrained", load)
    before = content(used)
    assert refused(train(work, used, *arguments), used, before) == difference


def test_other_labels_are_refused(work: Path, used: Path, tmp_path: Path) -> None:
    animals = ("cat", "dog", "emu")
    write_rows(tmp_path / "rows.jsonl", animals)
    write_rows(tmp_path / "validation.jsonl", animals, count=12)
    before = content(used)
    result = train(tmp_path, used, model=str(work / "base"))
    assert refused(result, used, before) == 'choices was ["red", "green", "blue"] and is now ["cat", "dog", "emu"]'


@pytest.mark.parametrize(
    ("rows", "difference"),
    [
        ("shifted.jsonl", "the rows of shifted.jsonl differ from those of rows.jsonl"),
        ("more.jsonl", "the rows of more.jsonl differ from those of rows.jsonl (24 before, 30 now)"),
    ],
)
def test_other_rows_are_refused(rows: str, difference: str, work: Path, used: Path) -> None:
    before = content(used)
    assert refused(train(work, used, rows=rows), used, before) == difference


def test_other_answers_in_a_file_of_the_same_name_are_refused(work: Path, used: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", shift=2)
    shutil.copy(work / "validation.jsonl", tmp_path)
    before = content(used)
    result = train(tmp_path, used, model=str(work / "base"))
    assert refused(result, used, before) == "the rows of rows.jsonl differ"


def test_other_texts_in_the_validation_file_are_refused(work: Path, used: Path, tmp_path: Path) -> None:
    shutil.copy(work / "rows.jsonl", tmp_path)
    changed = (work / "validation.jsonl").read_text().replace('"xxx', '"xxw')
    (tmp_path / "validation.jsonl").write_text(changed)
    before = content(used)
    result = train(tmp_path, used, model=str(work / "base"))
    assert refused(result, used, before) == "the rows of validation.jsonl differ"


def test_another_base_model_under_the_same_name_is_refused(work: Path, used: Path) -> None:
    before = content(used)
    difference = refused(train(work, used, model="other"), used, before)
    digest = '"[0-9a-f]{12}"'
    assert re.fullmatch(f"the SHA-256 of the base model was {digest} and is now {digest}", difference)


def test_another_lora_to_start_from_is_refused(work: Path, tmp_path: Path) -> None:
    tiny.write_adapter(tmp_path / "adapter", posterior_scale=2.0)
    export = ("export", "peft", "--adapter", tmp_path / "adapter", "--model", work / "base", "--num-samples", 2)
    exported = CliRunner().invoke(app, [*map(str, export), "--output", str(tmp_path / "loras")])
    assert exported.exit_code == 0, exported.output

    def from_lora(name: str) -> Result:
        common = ("train", "--model", work / "base", "--base-model-name", "tiny", "--output", tmp_path / "run")
        data = ("--train", work / "rows.jsonl", "--validation", work / "validation.jsonl")
        steps = ("--max-steps", 2, "--eval-steps", 2, "--init-from", tmp_path / "loras" / name)
        return CliRunner().invoke(app, [str(argument) for argument in (*common, *data, *steps)])

    assert from_lora("sample-0").exit_code == 0
    assert from_lora("sample-0").stdout.endswith("nothing was done\n")
    before = content(tmp_path / "run")
    first, second = (json.dumps(str(tmp_path / "loras" / name)) for name in ("sample-0", "sample-1"))
    assert refused(from_lora("sample-1"), tmp_path / "run", before) == f"init_from was {first} and is now {second}"
    shutil.rmtree(tmp_path / "loras" / "sample-0")
    shutil.copytree(tmp_path / "loras" / "sample-1", tmp_path / "loras" / "sample-0")
    told = refused(from_lora("sample-0"), tmp_path / "run", before)
    assert told == f"the LoRA in {tmp_path / 'loras' / 'sample-0'} (init_from) has changed"


@pytest.mark.parametrize("left", ["adapter", "configuration", "checkpoints"])
def test_a_folder_without_a_record_is_refused(left: str, work: Path, used: Path) -> None:
    """As an older release or a person leaves it."""
    (used / "training_run.json").unlink()
    if left != "checkpoints":
        shutil.rmtree(used / "checkpoints")
    if left != "adapter":
        (used / "adapter_model.safetensors").unlink()
    if left == "checkpoints":
        (used / "adapter_config.json").unlink()
    before = content(used)
    result = train(work, used)
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: {used} holds an adapter or checkpoints without training_run.json, which would say what they were made "
        f"from; {REMEDY}\n"
    )
    assert content(used) == before
    assert train(work, used, "--overwrite").exit_code == 0


@pytest.mark.parametrize(
    ("record", "message"),
    [(b"{", "cannot be read"), (b'{"format_version": 2}', "is not a record that this release reads (format_version: ")],
)
def test_a_record_that_cannot_be_read_is_refused(record: bytes, message: str, work: Path, used: Path) -> None:
    (used / "training_run.json").write_bytes(record)
    result = train(work, used)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {used / 'training_run.json'} {message}")
    assert result.stderr.endswith(f"{REMEDY}\n")


def test_overwriting_starts_anew_and_leaves_other_files_alone(work: Path, used: Path) -> None:
    before = content(used)
    (used / "notes.txt").write_text("mine")
    (used / "checkpoints" / "checkpoint-99").mkdir()
    result = train(work, used, "--overwrite", "--learning-rate", 0.5)
    assert result.exit_code == 0, result.output
    assert (used / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in (used / "checkpoints").iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert content(used)["adapter_model.safetensors"] != before["adapter_model.safetensors"]
    assert train(work, used, "--learning-rate", 0.5).stdout.endswith("nothing was done\n")
    assert train(work, used, "--overwrite").exit_code == 0
    assert content(used)["adapter_model.safetensors"] == before["adapter_model.safetensors"], "as the first time"


@pytest.mark.parametrize(
    "arguments",
    [("--target-modules", "w_pack"), ("--train", "absent.jsonl"), ("--model", "no/where"), ("--template", "no placeholder")],
)
def test_overwriting_removes_nothing_before_everything_has_been_checked(
    arguments: tuple[str, ...], work: Path, used: Path
) -> None:
    before = content(used)
    assert train(work, used, "--overwrite", *arguments).exit_code in (1, 2)
    assert content(used) == before


def test_a_run_cut_short_resumes_and_refuses_another_run(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    forward = VariationalModule.forward

    def cut(module: VariationalModule, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise RuntimeError("power cut")
        return forward(module, *args, **kwargs)

    monkeypatch.setattr(VariationalModule, "forward", cut)
    cut_short = train(work, tmp_path / "run")
    assert (cut_short.exit_code, "an unexpected RuntimeError: power cut" in cut_short.stderr) == (1, True)
    before = content(tmp_path / "run")
    assert "seed was 0 and is now 3" in refused(train(work, tmp_path / "run", "--seed", 3), tmp_path / "run", before)
    result = train(work, tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert calls == 4 + 2, "it went on from the checkpoint of step 2"
    whole, resumed = read_weights(work / "run"), read_weights(tmp_path / "run")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert json.loads(result.stdout.splitlines()[-1])["stochastic_parameters"] == 20


def test_a_calibrated_adapter_is_still_the_run_s_and_a_changed_one_is_not(work: Path, used: Path) -> None:
    config = read_config(used)
    save_config(used, config.model_copy(update={"temperature": 1.5, "posterior_scale": 0.5}))
    assert train(work, used).stdout.endswith("nothing was done\n")
    assert read_config(used).temperature == 1.5
    renamed = config.task.model_copy(update={"choices": ("cat", "dog", "emu")})
    save_config(used, config.model_copy(update={"task": renamed}))
    (used / "adapter_model.safetensors").write_bytes(b"something else")
    result = train(work, used)
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: the adapter in {used} was changed after its training: "
        'choices was ["red", "green", "blue"] and is now ["cat", "dog", "emu"]; '
        f"adapter_model.safetensors is another file; {REMEDY}\n"
    )


@pytest.mark.parametrize("arguments", [(), ("--overwrite",)])
def test_an_output_that_is_a_file_is_refused(arguments: tuple[str, ...], work: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        result = train(work, output, *arguments)
        assert result.exit_code == 1
        assert result.stderr == f"error: {tmp_path / 'file'} is not a folder; choose another --output\n"
    assert (tmp_path / "file").read_text() == "mine"
