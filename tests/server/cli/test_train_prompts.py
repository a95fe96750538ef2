"""What `scalabl train` records of the prompts: the token of each choice, the date, special tokens, many choices."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest
from scalabl_server.cli.main import app
from typer.testing import CliRunner, Result

from scalabl.files.adapter_directory import read_config
from scalabl.prompt import prompter
from tests import tiny

INTENTS = ["card_arrival", "card_linking", "card, lost", "top_up", "0", "00"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def train(folder: Path, choices: list[str], *arguments: object) -> Result:
    rows: list[dict[str, Any]] = [{"text": f"text {n}", "choices": choices, "answer": n % len(choices)} for n in range(12)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = ("--model", folder / "base", "--train", folder / "rows.jsonl", "--validation", folder / "rows.jsonl")
    return run("train", *data, "--output", folder / "new", "--max-steps", 1, "--eval-steps", 1, "--r", 2, *arguments)


def test_labels_that_begin_alike_train_and_each_token_is_in_the_log_the_config_and_info(tmp_path: Path) -> None:
    tiny.write_base(tmp_path / "base")
    result = train(tmp_path, INTENTS)
    assert result.exit_code == 0, result.output
    task = read_config(tmp_path / "new").task
    assert task.choice_tokens is not None
    assert task.special_tokens_in_text == "text"
    for choice, token in zip(INTENTS, task.choice_tokens, strict=True):
        assert f"{choice!r}: {tiny.tokenizer().decode([token])!r} ({token})" in result.stderr
    shown = json.loads(run("info", tmp_path / "new").stdout)
    assert shown["token_of_each_choice"] == dict(zip(INTENTS, task.choice_tokens, strict=True))


def test_multiple_choice_of_more_choices_than_letters(tmp_path: Path) -> None:
    tiny.write_base(tmp_path / "base")
    result = train(tmp_path, [f"answer {n}" for n in range(30)], "--kind", "multiple_choice")
    assert result.exit_code == 0, result.output
    choices = read_config(tmp_path / "new").task.choices
    assert (len(choices), choices[-5:]) == (30, ("Z", "AA", "AB", "AC", "AD"))


def test_a_run_with_a_date_in_its_prompts_resumes_on_another_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.write_base(tmp_path / "base")
    template = "{{ strftime_now('%Y-%m-%d') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    (tmp_path / "base" / "chat_template.jinja").write_text(template)

    def trained(day: int, *arguments: str) -> Result:
        monkeypatch.setattr(prompter, "today", lambda: datetime.date(2031, 5, day))
        return train(tmp_path, ["red", "blue"], "--chat", *arguments)

    assert trained(1).exit_code == 0
    assert read_config(tmp_path / "new").task.chat_date == datetime.date(2031, 5, 1)
    assert json.loads((tmp_path / "new" / "adapter_config.json").read_text())["task"]["chat_date"] == "2031-05-01"
    assert trained(2).stdout.endswith("nothing was done\n")
    assert trained(2, "--overwrite").exit_code == 0
    assert read_config(tmp_path / "new").task.chat_date == datetime.date(2031, 5, 2)
