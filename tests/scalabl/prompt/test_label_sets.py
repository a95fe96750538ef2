"""The label sets of public data sets and business forms get tokens with real tokenizers, the same in every process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scalabl.errors import PromptError
from scalabl.files.adapter_directory import read_config
from scalabl.prompt import Prompter
from tests.scalabl.prompt.digests import digest, task_of
from tests.scalabl.prompt.tokenizers import load

ROOT = Path(__file__).resolve().parents[3]
TOKENIZERS = ("bytes", "smollm2", "gpt2", "gemma")


def label_sets(shared: Path) -> dict[str, list[str]]:
    sets: dict[str, list[str]] = json.loads((shared / "data" / "label_sets.json").read_text(encoding="utf-8"))
    return sets


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_label_set_has_distinct_tokens_and_is_served_with_them(name: str, shared: Path) -> None:
    tokenizer, sets = load(name), label_sets(shared)
    assert len(sets) == 48
    for label_set, labels in sets.items():
        if len(labels) > len(tokenizer):  # 1,000 ids to 259 tokens
            with pytest.raises(PromptError, match=f"{len(labels)} choices need as many tokens, .* has only 256 that"):
                Prompter(task_of(labels), tokenizer)
            continue
        trained = Prompter(task_of(labels), tokenizer)
        assert len(set(trained.choice_tokens)) == len(labels), label_set
        assert not set(trained.choice_tokens) & set(tokenizer.all_special_ids), label_set
        served = Prompter(trained.resolved_task, tokenizer)
        assert (served.mismatched, served.choice_tokens) == ([], trained.choice_tokens), label_set
        assert served.encode("x") == trained.encode("x"), label_set


@pytest.mark.parametrize("name", ["bytes", "smollm2"])
def test_the_tokens_are_the_same_in_another_process(name: str, shared: Path, tmp_path: Path) -> None:
    load(name).save_pretrained(tmp_path)
    run = subprocess.run(
        [sys.executable, "-m", "tests.scalabl.prompt.digests", str(shared / "data" / "label_sets.json"), str(tmp_path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "4321", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == digest(load(name), label_sets(shared))


def test_a_tokenizer_is_refused_that_is_not_the_one_of_the_training(shared: Path) -> None:
    smollm2, sets = load("smollm2"), label_sets(shared)
    for labels in sets.values():
        if len(labels) <= 256:
            trained = Prompter(task_of(labels), load("bytes")).resolved_task
            assert Prompter(trained, smollm2).mismatched, labels


def test_the_shipped_adapter_keeps_its_tokens() -> None:
    task = read_config(ROOT / "examples" / "intent_router" / "adapter").task
    fresh = Prompter(task.model_copy(update={"choice_tokens": None}), load("smollm2"))
    assert fresh.resolved_task == task


def test_ten_thousand_labels() -> None:
    tokenizer = load("smollm2")
    labels = [f"{kind} {number}" for number in range(2500) for kind in ("order", "invoice", "return", "refund")]
    trained = Prompter(task_of(labels), tokenizer)
    assert len(set(trained.choice_tokens)) == 10_000
    assert Prompter(trained.resolved_task, tokenizer).mismatched == []
