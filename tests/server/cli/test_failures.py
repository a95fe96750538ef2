"""What a command can raise is one line on standard error and status 1, 2 or 130, never a traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scalabl_server.cli import adapter_folders
from typer.testing import Result

from tests import tiny
from tests.server.cli.test_cli import COLOURS, _said, _train, run
from tests.server.cli.test_cli import work as work  # a fixture

DEEP = '{"text": ' + "[" * 3000 + "]" * 3000 + ', "choices": ["a", "b"], "answer": 0}\n'


def failed(result: Result, status: int, *parts: str) -> None:
    """It ended with this status and, if that is 1, with one line that has these parts, after what it said before."""
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == status, result.stderr
    for part in parts:
        assert part in _said(result), result.stderr
    assert "Traceback" not in result.stderr
    if status != 2:  # typer draws a box around usage errors
        said_before = ("warning: ", "token of each choice: ")
        (line,) = (line for line in result.stderr.splitlines() if not line.startswith(said_before))
        assert line.startswith("error: ")


def evaluate(work: Path, *arguments: object, data: Path | None = None) -> Result:
    common = ("--adapter", work / "adapter", "--model", work / "base", "--data", data or work / "rows.jsonl")
    return run("evaluate", *common, *arguments)


@pytest.mark.parametrize(
    ("option", "value", "limit"),
    [
        ("--seed", 2**32, "less than 4294967296"),
        ("--seed", -1, "greater than or equal to 0"),
        ("--seed", 10**30, "less than 4294967296"),
        ("--batch-size", 10**20, "less than or equal to 2147483647"),
        ("--max-steps", 2**31, "less than or equal to 2147483647"),
        ("--train-samples", 10**12, "less than or equal to 2147483647"),
    ],
)
def test_a_number_that_training_cannot_hold_is_refused_by_its_option(
    work: Path, tmp_path: Path, option: str, value: int, limit: str
) -> None:
    failed(_train(work, tmp_path / "new", f"{option}={value}"), 2, f"Invalid value for {option}", limit, str(value))


@pytest.mark.parametrize(
    ("command", "option", "value", "limit"),
    [
        ("evaluate", "--seed", 2**63, 2**63 - 1),
        ("evaluate", "--seed", 10**40, 2**63 - 1),
        ("evaluate", "--num-samples", 10**15, 2**20),
        ("evaluate", "--bootstrap", 10**15, 10**6),
        ("calibrate", "--seed", 2**63, 2**63 - 1),
        ("calibrate", "--split-seed", 2**63, 2**63 - 1),
    ],
)
def test_a_number_out_of_range_is_refused_by_its_option(
    work: Path, command: str, option: str, value: int, limit: int
) -> None:
    common = ("--adapter", work / "adapter", "--model", work / "base", "--data", work / "rows.jsonl")
    failed(run(command, *common, option, value), 2, f"Invalid value for '{option}'", str(limit))


@pytest.mark.parametrize("kind", ["peft", "vllm"])
def test_a_seed_out_of_range_is_refused_by_export(work: Path, tmp_path: Path, kind: str) -> None:
    result = run("export", kind, "--adapter", work / "adapter", "--output", tmp_path / "out", "--seed", 2**63)
    failed(result, 2, "Invalid value for '--seed'", str(2**63 - 1))


def test_the_largest_seeds_work(work: Path, tmp_path: Path) -> None:
    assert evaluate(work, "--seed", 2**63 - 1, "--bootstrap", 0).exit_code == 0
    assert _train(work, tmp_path / "new", "--seed", 2**32 - 1, "--max-steps", 1).exit_code == 0


def test_a_row_that_is_nested_too_deeply_is_named(work: Path, tmp_path: Path) -> None:
    deep = tmp_path / "deep.jsonl"
    deep.write_text((work / "rows.jsonl").read_text().splitlines()[0] + "\n" + DEEP)
    said = f"error: {deep}:2: the row is nested too deeply; it needs a text and a label only"
    failed(evaluate(work, data=deep), 1, said)
    failed(evaluate(work, "--ood", deep), 1, said)
    failed(_train(work, tmp_path / "new", "--validation", deep), 1, said)
    failed(run("calibrate", "--adapter", work / "adapter", "--model", work / "base", "--data", deep), 1, said)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('only tools may speak') }}", "(TemplateError: only tools may speak)"),
        ("{% for m in messages %}", "(TemplateSyntaxError: Unexpected end of template"),
        ("{{ messages[0].tools.name }}", "(UndefinedError: 'dict object' has no attribute 'tools')"),
        ("{{ 1 + messages[0].content }}", "(TypeError: unsupported operand type(s)"),
    ],
)
def test_a_chat_template_that_raises_is_named(work: Path, tmp_path: Path, template: str, said: str) -> None:
    base = tmp_path / "base"
    shutil.copytree(work / "base", base)
    (base / "chat_template.jinja").write_text(template)
    result = _train(work, tmp_path / "new", "--model", base, "--chat")
    failed(result, 1, "the tokenizer's chat template raises an error", said, "correct the template, or set chat to false")


def test_a_layer_that_is_not_there_is_named_with_those_that_are(work: Path, tmp_path: Path) -> None:
    said = "layers_to_transform names layer 9, but the base model's layers are 0 to 1"
    for layers in ("9", "0,9", "1,9"):
        failed(_train(work, tmp_path / "new", "--layers-to-transform", layers), 1, said)


def _damage(base: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    (base / name).write_bytes(change((base / name).read_bytes()))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.safetensors", lambda data: data[: len(data) // 2]),
        ("model.safetensors", lambda data: b""),
        ("tokenizer.json", lambda data: b'{"model": {}}'),
        ("tokenizer.json", lambda data: data[:100]),
        ("config.json", lambda data: b"[" * 100_000),
        ("config.json", lambda data: b"[1]"),
        ("config.json", lambda data: b"\xff\xfe"),
        ("config.json", lambda data: data.replace(b'"hidden_size": 32', b'"hidden_size": 48')),
    ],
)
def test_a_damaged_base_model_is_named(work: Path, tmp_path: Path, name: str, change: Callable[[bytes], bytes]) -> None:
    base = tmp_path / "base"
    shutil.copytree(work / "base", base)
    _damage(base, name, change)
    result = run("evaluate", "--adapter", work / "adapter", "--model", base, "--data", work / "rows.jsonl")
    failed(result, 1, f"the base model '{base}' cannot be loaded")


def test_a_folder_in_the_place_of_a_file_is_named(work: Path, tmp_path: Path) -> None:
    said = f"error: {tmp_path} is a folder without dataset_dict.json"
    failed(evaluate(work, data=tmp_path), 1, said)
    failed(_train(work, tmp_path / "new", "--train", tmp_path), 1, said)
    common = ("--base-model", "b", "--lora-alpha", 4, "--label", "A", "--label", "B", "--choice-tokens", "5,6")
    made = run("convert", "bayesadapt", "--checkpoint", tmp_path, "--output", tmp_path / "out", *common)
    failed(made, 1, f"error: {tmp_path} cannot be used: Is a directory")
    (tmp_path / "adapter_config.json").mkdir()
    failed(run("info", tmp_path), 1, f"{tmp_path / 'adapter_config.json'} cannot be read as JSON", "Is a directory")


def test_a_file_in_the_place_of_a_folder_is_named(work: Path) -> None:
    file = work / "rows.jsonl"
    failed(run("info", file), 1, f"{file / 'adapter_config.json'} cannot be read as JSON", "Not a directory")
    failed(evaluate(work, "--plots", file), 2, "Invalid value for --plots: must be a folder, and a file has this name")


def test_an_option_that_cannot_be_a_path_is_one_line(work: Path) -> None:
    failed(evaluate(work, "--output", "a" * 300), 1, "cannot be used: File name too long")


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch, work: Path) -> Callable[[BaseException], Result]:
    """`scalabl info`, in which printing raises this."""

    def command(error: BaseException) -> Result:
        def fail(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr(adapter_folders.json, "dumps", fail)
        try:
            return run("info", work / "adapter")
        finally:
            monkeypatch.undo()

    return command


def test_ctrl_c_is_a_word_and_its_own_status(raising: Callable[[BaseException], Result]) -> None:
    result = raising(KeyboardInterrupt())
    assert (result.exit_code, result.stderr) == (130, "error: interrupted\n")


def test_a_reader_that_goes_away_gets_no_message(raising: Callable[[BaseException], Result]) -> None:
    result = raising(BrokenPipeError(32, "Broken pipe"))
    assert (result.exit_code, result.stderr) == (1, "")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "error: there is not enough memory (MemoryError); lower the number of samples"),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 80 bytes.\n more"),
            "you tried to allocate 80 bytes.); lower the number of samples, the batch size or the rank",
        ),
        (PermissionError(13, "Permission denied", "/a/b"), "error: /a/b cannot be used: Permission denied"),
        (OSError(28, "No space left on device"), "error: No space left on device"),
        (KeyError("x\ny"), "error: an unexpected KeyError: 'x\\ny'. This is a fault of the program: please report it"),
    ],
)
def test_what_nobody_expected_is_one_line(raising: Callable[[BaseException], Result], error: Exception, said: str) -> None:
    failed(raising(error), 1, said)


def test_the_traceback_is_shown_when_it_is_asked_for(
    raising: Callable[[BaseException], Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCALABL_TRACEBACK", "1")
    error = ZeroDivisionError("by zero")
    assert raising(error).exception is error


def test_wrong_usage_is_status_2(work: Path) -> None:
    failed(run("info"), 2, "Missing argument")
    failed(run("nowhere"), 2, "No such command")
    failed(run("evaluate", "--nowhere"), 2, "No such option")
    assert run("--version").exit_code == run("convert", "--help").exit_code == 0
    assert json.loads(run("info", work / "adapter").stdout)["task"]["choices"] == COLOURS


@pytest.mark.parametrize("folder", ["absent", "", "rows.jsonl"])
def test_a_server_whose_metrics_have_no_folder_says_so(work: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    """Set for another program, it would make prometheus_client fail, or write into the current folder."""
    value = str(work / folder) if folder else ""
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", value)
    monkeypatch.setattr("scalabl_server.observe.logs.configure", lambda *_: None)
    result = run("serve", "--adapter", work / "adapter", "--model", work / "base")
    failed(
        result, 1, f"error: PROMETHEUS_MULTIPROC_DIR is {value!r}, which is not a folder that can be written to; unset it"
    )


def test_the_tiny_base_has_the_layers_that_the_tests_name() -> None:
    assert tiny.base_model().config.num_hidden_layers == 2
