"""`scalabl convert peft`, `export peft`, `export vllm` and `train --init-from` on real files; errors are one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from scalabl_server.cli.main import app
from typer.testing import CliRunner, Result

from scalabl.files.adapter_directory import load_adapter, read_config
from scalabl.model.token_batch import TokenBatch
from tests import tiny

COLOURS = list(tiny.CLASSIFICATION.choices)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, an adapter for it, two of its samples as LoRA directories, and data."""
    folder = tmp_path_factory.mktemp("work")
    tiny.write_base(folder / "base")
    tiny.write_adapter(folder / "adapter")
    exported = run("export", "peft", "--adapter", folder / "adapter", "--model", folder / "base", "--num-samples", 2,
                   "--output", folder / "samples")  # fmt: skip
    assert exported.exit_code == 0, exported.output
    assert exported.stdout == f"wrote {folder / 'samples'}: sample-0 … sample-1\n"
    rows = [{"text": "xyz"[i % 3] * (1 + i % 5), "choices": COLOURS, "answer": i % 3} for i in range(24)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


LABELS = ("--label", "red", "--label", "green", "--label", "blue")


def _mean_logits(work: Path, adapter: Path) -> torch.Tensor:
    model = load_adapter(tiny.base_model(), adapter)
    return model.logits(TokenBatch.of(tiny.ragged()), model.mean_draw())[:, 0]


def _sample_logits(work: Path, index: int) -> torch.Tensor:
    model = load_adapter(tiny.base_model(), work / "adapter")
    return model.logits(TokenBatch.of(tiny.ragged()), model.draws(2))[:, index]


def test_a_lora_becomes_an_adapter_with_its_logits(work: Path, tmp_path: Path) -> None:
    data = ("--peft", work / "samples" / "sample-1", "--model", work / "base", *LABELS)
    options = ("--relative-sigma", 0.2, "--base-model-name", "mine", "--output", tmp_path / "new")
    result = run("convert", "peft", *data, *options)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"wrote {tmp_path / 'new'}: rank 4, target modules lm_head, q_proj, v_proj\n"
    config = read_config(tmp_path / "new")
    task = read_config(work / "adapter").task.model_copy(update={"special_tokens_in_text": "text"})
    assert (config.base_model_name_or_path, config.task) == ("mine", task)
    assert (_mean_logits(work, tmp_path / "new") - _sample_logits(work, 1)).abs().max() <= 1e-5


def _converted(work: Path, output: Path, *arguments: object) -> Result:
    return run(
        "convert", "peft", "--peft", work / "samples" / "sample-1", "--model", work / "base", "--output", output, *arguments
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("labels.txt", "\ufeffFood, drink\r\nSports\r\n\r\n a b \r\n"),
        ("labels.json", json.dumps(["Food, drink", "Sports", " a b "])),
        (None, ""),
    ],
)
def test_labels_are_what_a_file_or_the_flags_say_commas_and_spaces_included(
    name: str | None, content: str, work: Path, tmp_path: Path
) -> None:
    labels = ("Food, drink", "Sports", " a b ")
    arguments: list[object] = [part for label in labels for part in ("--choices", label)]
    if name is not None:
        (tmp_path / name).write_bytes(content.encode())
        arguments = ["--labels", tmp_path / name]
    result = _converted(work, tmp_path / "new", *arguments)
    assert result.exit_code == 0, result.output
    assert read_config(tmp_path / "new").task.choices == labels


def _unwrapped(text: str) -> str:
    """The text without spaces, line ends and the box that typer draws, which may cut a long path anywhere."""
    return "".join(text.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--choices", "Food, drink,Sports"), "'Food, drink,Sports' is one label, because labels may have commas; repeat"),
        ((), "give each label by --label, or all of them in a file by --labels"),
        (("--label", "a", "--labels", "{tmp}/none"), "give each label by --label, or all of them in a file by --labels"),
        (("--labels", "{tmp}/none"), "none cannot be read"),
        (("--labels", "{tmp}/numbers.json"), "numbers.json must be a JSON list of strings"),
        (("--label", "a", "--label", "a"), "choices are not distinct: 'a' appears twice"),
    ],
)
def test_labels_that_are_none_are_refused(arguments: tuple[str, ...], message: str, work: Path, tmp_path: Path) -> None:
    (tmp_path / "numbers.json").write_text("[1, 2]")
    result = _converted(work, tmp_path / "new", *(part.format(tmp=tmp_path) for part in arguments))
    assert result.exit_code == 2
    assert _unwrapped(message) in _unwrapped(result.stderr)


def test_an_adapter_says_how_it_encodes_special_tokens_and_older_releases_read_one_of_before(
    work: Path, tmp_path: Path
) -> None:
    assert _converted(work, tmp_path / "new", *LABELS).exit_code == 0
    assert _converted(work, tmp_path / "old", *LABELS, "--special-tokens-in-text", "control").exit_code == 0
    new, old = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("new", "old"))
    assert (new["format_version"], new["task"]["special_tokens_in_text"]) == (2, "text")
    assert old["format_version"] == 1
    assert set(old["task"]) == {"kind", "template", "choices", "choice_tokens", "chat", "choice_prefix"}


def test_converting_into_a_folder_that_is_not_empty_needs_overwrite(work: Path, tmp_path: Path) -> None:
    def convert(sample: str, *arguments: object) -> Result:
        data = ("--peft", work / "samples" / sample, "--model", work / "base", *LABELS)
        return run("convert", "peft", *data, "--output", tmp_path / "new", *arguments)

    assert convert("sample-0").exit_code == 0
    again = convert("sample-1")
    remedy = "choose another --output, or add --overwrite to replace the adapter in it"
    assert (again.exit_code, again.stderr) == (1, f"error: {tmp_path / 'new'} is not empty; {remedy}\n")
    assert (_mean_logits(work, tmp_path / "new") - _sample_logits(work, 0)).abs().max() <= 1e-5
    assert convert("sample-1", "--overwrite").exit_code == 0
    assert (_mean_logits(work, tmp_path / "new") - _sample_logits(work, 1)).abs().max() <= 1e-5


@pytest.mark.parametrize("command", ["convert", "train"])
def test_the_lora_that_is_read_is_never_overwritten(command: str, work: Path, tmp_path: Path) -> None:
    shutil.copytree(work / "samples" / "sample-0", tmp_path / "lora")
    before = (tmp_path / "lora" / "adapter_model.safetensors").read_bytes()
    if command == "train":
        result = _train(work, tmp_path / "lora", "--init-from", tmp_path / "lora", "--overwrite")
    else:
        data = ("--peft", tmp_path / "lora", "--model", work / "base", *LABELS)
        result = run("convert", "peft", *data, "--output", tmp_path / "lora", "--overwrite")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {tmp_path / 'lora'} is the LoRA ")
    assert result.stderr.endswith("; choose another --output\n")
    assert (tmp_path / "lora" / "adapter_model.safetensors").read_bytes() == before


def _train(work: Path, output: Path, *arguments: object) -> Result:
    data = ("--model", work / "base", "--train", work / "rows.jsonl", "--validation", work / "rows.jsonl")
    return run("train", *data, "--output", output, "--eval-steps", 1, "--max-steps", 1, *arguments)


def test_export_for_vllm_prints_what_its_lora_modules_take(work: Path, tmp_path: Path) -> None:
    options = ("--adapter", work / "adapter", "--model", work / "base", "--output", tmp_path / "loras")
    result = run("export", "vllm", *options, "--num-samples", 2)
    assert result.exit_code == 0, result.output
    folders = dict(line.split("=") for line in result.stdout.splitlines())
    assert len(folders) == 2 + 3  # samples, and one for each kind of module
    for name, folder in folders.items():
        assert folder == str(tmp_path / "loras" / name)
        assert json.loads((Path(folder) / "adapter_config.json").read_text())["peft_type"] == "LORA"
    again = run("export", "vllm", *options, "--num-samples", 2, "--seed", 1)
    assert not set(folders) & {line.partition("=")[0] for line in again.stdout.splitlines()}


def test_training_starts_from_a_finished_lora(work: Path, tmp_path: Path) -> None:
    still = ("--learning-rate", 1e-9, "--sigma-learning-rate", 1e-9, "--init-from", work / "samples" / "sample-1")
    result = _train(work, tmp_path / "new", *still, "--std-init", 0.2)
    assert result.exit_code == 0, result.output
    config = read_config(tmp_path / "new")
    assert (config.r, set(config.target_modules)) == (4, {"q_proj", "v_proj", "lm_head"})
    assert (_mean_logits(work, tmp_path / "new") - _sample_logits(work, 1)).abs().max() <= 1e-4
    weights = load_file(tmp_path / "new" / "adapter_model.safetensors")
    for name in (name for name in weights if name.endswith(".s_mean")):
        has_mean = weights[name] > 0  # the head of three choices has three directions
        share = (weights[name.replace(".s_mean", ".s_log_std")].exp() / weights[name])[has_mean]
        assert bool(((share > 0.2 * 0.7) & (share < 0.2 * 1.01)).all())


@pytest.mark.parametrize("option", ["--r", "--lora-alpha", "--target-modules", "--layers-to-transform"])
def test_what_the_lora_decides_cannot_be_given_too(option: str, work: Path, tmp_path: Path) -> None:
    result = _train(work, tmp_path / "new", "--init-from", work / "samples" / "sample-1", option, 2)
    assert result.exit_code == 2
    said = " ".join(result.stderr.replace("│", " ").split())
    assert f"{option}: the LoRA of --init-from sets this value" in said
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (
            ("export", "peft", "--adapter", "{work}/adapter", "--output", "{work}/samples"),
            "samples already exists; choose a new",
        ),
        (("export", "peft", "--adapter", "{work}/base", "--output", "{work}/other"), "base has no adapter_config.json"),
        (
            ("convert", "peft", "--peft", "{work}/adapter", "--label", "a", "--label", "b", "--output", "{work}/other"),
            "must be 'LORA'",
        ),
        (
            ("convert", "peft", "--peft", "{work}/samples/sample-0", "--label", "red", "--output", "{work}/other"),
            "--choices",
        ),
        (
            ("convert", "peft", "--peft", "{work}/none", "--label", "a", "--label", "b", "--output", "{work}/other"),
            "none/adapter_config.json does not exist",
        ),
    ],
)
def test_what_cannot_be_done_is_one_line(command: tuple[str, ...], message: str, work: Path) -> None:
    result = run(*(part.format(work=work) for part in command), "--model", work / "base")
    assert result.exit_code in (1, 2)
    assert _unwrapped(message) in _unwrapped(result.stderr)
    assert isinstance(result.exception, SystemExit), result.exception
    assert not (work / "other").exists()


def test_a_lora_for_another_model_is_refused_before_training(work: Path, tmp_path: Path) -> None:
    tensors = load_file(work / "samples" / "sample-0" / "adapter_model.safetensors")
    narrow = {name: tensor[:, :16].contiguous() if "lora_A" in name else tensor for name, tensor in tensors.items()}
    (tmp_path / "lora").mkdir()
    save_file(narrow, tmp_path / "lora" / "adapter_model.safetensors")
    config = (work / "samples" / "sample-0" / "adapter_config.json").read_text()
    (tmp_path / "lora" / "adapter_config.json").write_text(config)
    result = _train(work, tmp_path / "new", "--init-from", tmp_path / "lora")
    assert result.exit_code == 1
    assert "the LoRA of 'lm_head' maps 16 to 3 features; that layer of the base model maps 32 to 3" in result.stderr
