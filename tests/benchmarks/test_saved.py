"""The study's scores are taken for a run's only if they were made from what the run is made from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.results import saved
from benchmarks.results.plan import our_runs, peer_runs, sweep_runs
from benchmarks.results.saved import CODE, OtherRunError, read_logits, save_logits, save_scores, scores_of

MADE_FROM: dict[str, Any] = {
    "code": 1,
    "sets": {"test": {"count": 3, "answers_sha256": "ab"}},
    "training": {"seed": 0, "learning_rate": 0.1},
    "run": {"name": "mine", "recipe": (("std_init", 0.5),)},
}


@pytest.fixture(autouse=True)
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Scores of the tests, except for the test of the committed ones."""
    if "committed" not in request.node.name:
        monkeypatch.setattr(saved, "SCORES", tmp_path / "scores")
    return tmp_path


def test_scores_come_back_for_the_run_that_made_them() -> None:
    assert scores_of("mine", MADE_FROM) is None
    save_scores("mine", {"accuracy": 0.5}, MADE_FROM)
    assert scores_of("mine", MADE_FROM) == scores_of("mine")
    newer = MADE_FROM | {"training": {**MADE_FROM["training"], "new_option": None}}
    assert (scores_of("mine", newer) or {})["accuracy"] == 0.5, "a setting that is newer than the file"


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"code": 2}, "code"),
        ({"sets": {"test": {"count": 3, "answers_sha256": "cd"}}}, "sets.test.answers_sha256"),
        ({"training": {"seed": 0, "learning_rate": 0.2}}, "training.learning_rate"),
        ({"run": {"name": "mine", "recipe": ()}}, "run.recipe"),
        ({"training": {"seed": 0}}, "training.learning_rate"),
    ],
)
def test_scores_of_another_plan_other_data_or_other_code_are_refused(change: dict[str, Any], name: str) -> None:
    save_scores("mine", {"accuracy": 0.5}, MADE_FROM)
    with pytest.raises(OtherRunError, match=rf"mine.json was made from something else \({name}\); remove it to run mine"):
        scores_of("mine", MADE_FROM | change)


def test_scores_that_do_not_say_what_they_were_made_from_are_refused() -> None:
    saved.SCORES.mkdir()
    (saved.SCORES / "mine.json").write_text("{}")
    with pytest.raises(OtherRunError, match="it does not say what"):
        scores_of("mine", MADE_FROM)


def test_logits_of_something_else_are_refused(folder: Path) -> None:
    path = folder / "logits.safetensors"
    save_logits(path, {"test": torch.ones(2)}, MADE_FROM)
    assert read_logits(path, MADE_FROM)["test"].tolist() == [1, 1]
    with pytest.raises(OtherRunError, match="remove it, or choose another --folder"):
        read_logits(path, MADE_FROM | {"code": 2})


def test_the_committed_scores_are_those_of_today_s_plan() -> None:
    """What needs neither the data nor the base model."""
    for run in [*peer_runs(), *sweep_runs(), *our_runs()]:
        scores = scores_of(run.name)
        assert scores is not None, run.name
        made_from = scores["made_from"]
        assert (made_from["code"], made_from["run"]) == (CODE, json.loads(json.dumps(dataclasses.asdict(run))))
        assert made_from["training"].items() <= run.training.model_dump(mode="json").items()
    shared = {"code", "num_samples", "adapter", "base_model", "sets"}
    files = [json.loads(path.read_text())["made_from"] for path in saved.SCORES.glob("*.json")]
    assert len({json.dumps({name: content[name] for name in sorted(shared)}) for content in files}) == 1
