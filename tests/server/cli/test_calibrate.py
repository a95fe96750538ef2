"""`scalabl calibrate` on a real adapter, and what a server answers with the adapter afterwards."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from scalabl_server.cli.main import app
from typer.testing import CliRunner, Result

from scalabl.config import AdapterConfig
from scalabl.evaluation import calibration
from scalabl.files.adapter_directory import read_config, read_weights
from scalabl.uncertainty.conformal import set_scores
from tests import tiny
from tests.server.conftest import serving, settings_for

COLOURS = list(tiny.CLASSIFICATION.choices)


def _write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def _rows(count: int) -> list[dict[str, Any]]:
    return [{"text": "xyzuvw"[i % 6] * (1 + i % 5), "choices": COLOURS, "answer": (i * i) % 3} for i in range(count)]


def _calibrate(base: Path, adapter: Path, data: Path, *arguments: object) -> Result:
    command = ["calibrate", "--adapter", adapter, "--model", base, "--data", data, *arguments]
    return CliRunner().invoke(app, [str(each) for each in command])


@pytest.fixture(scope="module")
def calibrated(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of `colours`, calibrated with abstention, with its report and plot beside it."""
    work = tmp_path_factory.mktemp("calibrated")
    shutil.copytree(folders / "colours", work / "colours")
    data = _write(work / "rows.jsonl", _rows(60))
    options = ("--num-samples", 8, "--target-risk", 0.9, "--plot", work / "fit.png")
    result = _calibrate(folders / "base", work / "colours", data, *options)
    assert result.exit_code == 0, result.output
    (work / "report.json").write_text(result.stdout)
    return work


@pytest.fixture(scope="module")
def client(calibrated: Path, folders: Path) -> Iterator[TestClient]:
    with serving(settings_for(folders, adapter=calibrated / "colours", num_samples=8)) as made:
        yield made


def _one(client: TestClient, **body: Any) -> dict[str, Any]:
    response = client.post("/predict", json=body)
    assert response.status_code == 200, response.text
    (prediction,) = response.json()["predictions"]
    return dict(prediction)


def test_the_adapter_gets_scale_temperature_and_thresholds_and_keeps_the_rest(calibrated: Path, folders: Path) -> None:
    before, after = read_config(folders / "colours"), read_config(calibrated / "colours")
    found = after.calibration
    assert found is not None
    assert (found.num_samples, found.seed, found.draw_scheme, found.method) == (8, 0, "sobol", "lac")
    data = calibrated / "rows.jsonl"
    assert (found.data.name, found.data.rows) == (f"{calibrated.name}/rows.jsonl", 60)
    assert found.data.sha256 == hashlib.sha256(data.read_bytes()).hexdigest()
    assert list(found.thresholds["aps"]) == list(found.levels) == ["0.8", "0.9", "0.95"]
    assert found.after.nll < found.before.nll
    unchanged = after.model_copy(update={"posterior_scale": 1.0, "temperature": 1.0, "calibration": None})
    assert unchanged == before
    theirs, ours = read_weights(folders / "colours"), read_weights(calibrated / "colours")
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)
    assert sorted(path.name for path in (calibrated / "colours").iterdir()) == sorted(
        path.name for path in (folders / "colours").iterdir()
    )


def test_the_report_has_the_path_of_the_fit_and_the_plot_is_drawn(calibrated: Path) -> None:
    report = json.loads((calibrated / "report.json").read_text())
    scales = [trial["posterior_scale"] for trial in report["trials"]]
    assert scales == sorted(scales)
    assert {0.25, 0.5, 1.0, 2.0, 4.0} <= set(scales)
    best = min(report["trials"], key=lambda trial: trial["penalised_nll"])
    (chosen,) = [trial for trial in report["trials"] if trial["posterior_scale"] == report["posterior_scale"]]
    assert chosen in (best, next(trial for trial in report["trials"] if trial["posterior_scale"] == 1))
    assert chosen["temperature"] == report["temperature"]
    assert (calibrated / "fit.png").read_bytes().startswith(b"\x89PNG")


def test_calibrating_again_starts_from_the_posterior_as_trained(calibrated: Path, folders: Path, tmp_path: Path) -> None:
    shutil.copytree(calibrated / "colours", tmp_path / "colours")
    options = ("--num-samples", 8, "--target-risk", 0.9)
    result = _calibrate(folders / "base", tmp_path / "colours", calibrated / "rows.jsonl", *options)
    assert result.exit_code == 0, result.output
    assert read_config(tmp_path / "colours") == read_config(calibrated / "colours")


def test_an_adapter_that_is_replaced_meanwhile_is_left_as_it_is(
    calibrated: Path, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the old labels would be written over the new adapter's."""
    shutil.copytree(folders / "colours", tmp_path / "colours")
    calibrate = calibration.calibrate

    def slow(*arguments: Any, **options: Any) -> Any:
        tiny.write_adapter(tmp_path / "colours", prior_std=0.3, seed=5)
        return calibrate(*arguments, **options)

    monkeypatch.setattr(calibration, "calibrate", slow)
    data = (calibrated / "rows.jsonl", "--num-samples", 8, "--target-risk", 0.9)
    result = _calibrate(folders / "base", tmp_path / "colours", *data)
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == (
        f"error: {tmp_path / 'colours'} was changed while it was calibrated; nothing was written, so calibrate it again"
    )
    config = read_config(tmp_path / "colours")
    assert (config.prior_std, config.calibration) == (0.3, None)


def test_a_prediction_has_its_set_and_whether_to_abstain(client: TestClient, calibrated: Path) -> None:
    found = read_config(calibrated / "colours").calibration
    assert found is not None
    assert found.abstain is not None
    for text in ("xx", "yyyy", "w", "a text of another kind"):
        answer = _one(client, inputs=text)
        p = torch.tensor(list(answer["probabilities"].values()), dtype=torch.float64)
        members = {
            c for c, score in zip(COLOURS, set_scores(p, "lac").tolist(), strict=True) if score <= found.levels["0.9"]
        }
        given = answer["prediction_set"]
        assert (given["coverage"], given["method"]) == (0.9, "lac")
        assert set(given["labels"]) == members | {answer["prediction"]}
        assert given["labels"] == sorted(given["labels"], key=answer["probabilities"].__getitem__, reverse=True)
        doubt = {**answer, "confidence": 1 - answer["confidence"]}[found.abstain.score]
        assert answer["abstain"] is (doubt > found.abstain.threshold)


def test_a_request_may_name_its_coverage(client: TestClient) -> None:
    small, large = (_one(client, inputs="xx", coverage=level)["prediction_set"] for level in (0.8, 0.95))
    assert (small["coverage"], large["coverage"]) == (0.8, 0.95)
    assert set(small["labels"]) <= set(large["labels"])


@pytest.mark.parametrize(
    ("coverage", "message"),
    [
        (0.85, "coverage: 0.85 was not calibrated; use one of 0.8, 0.9, 0.95"),
        (1, "coverage: Input should be less than 1"),
        ("most", "coverage: Input should be a valid number"),
    ],
)
def test_a_coverage_that_cannot_be_had_is_refused(client: TestClient, coverage: object, message: str) -> None:
    response = client.post("/predict", json={"inputs": "xx", "coverage": coverage})
    assert response.status_code == 422
    assert response.json()["detail"].startswith(message)


def test_without_a_calibration_both_are_null_and_a_coverage_is_refused(colours: TestClient) -> None:
    answer = _one(colours, inputs="xx")
    assert (answer["prediction_set"], answer["abstain"]) == (None, None)
    response = colours.post("/predict", json={"inputs": "xx", "coverage": 0.9})
    assert response.status_code == 422
    assert response.json()["detail"].startswith("coverage: this adapter is not calibrated")


def test_info_shows_the_calibration(client: TestClient, colours: TestClient, calibrated: Path) -> None:
    config = read_config(calibrated / "colours")
    assert config.calibration is not None
    adapter = client.get("/info").json()["adapter"]
    assert adapter["calibration"] == config.calibration.model_dump(mode="json")
    assert (adapter["posterior_scale"], adapter["temperature"]) == (config.posterior_scale, config.temperature)
    assert colours.get("/info").json()["adapter"]["calibration"] is None


def test_rows_that_are_all_answered_right_leave_the_adapter_as_sure_as_it_was_and_say_why(
    folders: Path, tmp_path: Path, serve: Callable[..., TestClient]
) -> None:
    shutil.copytree(folders / "colours", tmp_path / "colours")
    untouched = serve(adapter=tmp_path / "colours", num_samples=8)
    rows = _rows(228)
    for row in rows:
        row["answer"] = COLOURS.index(_one(untouched, inputs=row["text"])["prediction"])
    data, plot = _write(tmp_path / "easy.jsonl", rows), tmp_path / "fit.png"
    result = _calibrate(folders / "base", tmp_path / "colours", data, "--num-samples", 8, "--plot", plot)
    assert result.exit_code == 0, result.output
    assert plot.exists(), "drawn although no scale was tried"
    notes = [line for line in result.stderr.splitlines() if line.startswith("note: ")]
    assert notes == [
        "note: posterior scale and temperature stay 1: 0 of the 114 rows to fit are answered wrong, and fewer than 8 errors "
        "cannot tell; give more rows, not easier ones than the adapter will serve",
        "note: abstention uses entropy: too few rows to fit are answered wrong to compare the doubt scores",
    ]
    assert json.loads(result.stdout)["notes"] == [note.removeprefix("note: ") for note in notes]
    config = read_config(tmp_path / "colours")
    assert (config.posterior_scale, config.temperature) == (1, 1)
    assert config.calibration is not None
    assert config.calibration.before == config.calibration.after
    assert config.calibration.abstain is not None
    assert config.calibration.abstain.score == "entropy"
    assert config.calibration.abstain.risk_bound <= 0.05


def test_multiple_choice_sets_hold_the_choices_of_the_request(
    folders: Path, tmp_path: Path, serve: Callable[..., TestClient]
) -> None:
    shutil.copytree(folders / "letters", tmp_path / "letters")
    rows = [{"text": "why" * (1 + i % 4), "choices": ["x", "y", "z"][: 2 + i % 2], "answer": i % 2} for i in range(60)]
    options = ("--num-samples", 4, "--no-abstain", "--method", "aps", "--levels", "0.95")
    result = _calibrate(folders / "base", tmp_path / "letters", _write(tmp_path / "rows.jsonl", rows), *options)
    assert result.exit_code == 0, result.output
    answer = _one(serve(adapter=tmp_path / "letters", num_samples=4), inputs="whywhy", choices=["one", "two"])
    assert answer["prediction_set"]["coverage"] == 0.95
    assert answer["prediction_set"]["method"] == "aps"
    assert set(answer["prediction_set"]["labels"]) <= {"one", "two"}
    assert answer["abstain"] is None


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (60, ("--target-risk", 0.05), "needs at least 90 rows for the thresholds and there are 30"),
        (60, ("--target-risk", 0), "--target-risk"),
        (10, ("--levels", "0.5", "--no-abstain"), "error: calibration needs at least 20 rows, and there are 10"),
        (30, (), "error: prediction sets at level 0.95 need at least 19 rows for the thresholds and there are 15"),
        (30, ("--levels", "90"), "--levels"),
        (30, ("--levels", "many"), "--levels"),
        (30, ("--method", "best"), "--method"),
        (30, ("--plot", "fit.txt"), "--plot"),
        (30, ("--plot", "nowhere/fit.png"), "--plot"),
    ],
)
def test_what_cannot_be_had_is_a_message_and_leaves_the_adapter_as_it_was(
    rows: int, arguments: tuple[object, ...], message: str, folders: Path, tmp_path: Path
) -> None:
    shutil.copytree(folders / "colours", tmp_path / "colours")
    data = _write(tmp_path / "rows.jsonl", _rows(rows))
    result = _calibrate(folders / "base", tmp_path / "colours", data, "--num-samples", 2, *arguments)
    assert result.exit_code in (1, 2)
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert isinstance(result.exception, SystemExit), result.exception
    assert read_config(tmp_path / "colours") == read_config(folders / "colours")


def test_an_adapter_written_before_calibration_existed_loads(folders: Path, tmp_path: Path) -> None:
    fields = json.loads((folders / "colours" / "adapter_config.json").read_text())
    del fields["calibration"]
    assert AdapterConfig.model_validate(fields).calibration is None


def test_a_risk_that_the_answers_do_not_allow_is_an_error_that_says_what_was_kept(folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders / "colours", tmp_path / "colours")
    data = _write(tmp_path / "rows.jsonl", _rows(200))
    result = _calibrate(folders / "base", tmp_path / "colours", data, "--num-samples", 2, "--target-risk", 0.05)
    assert result.exit_code == 1
    assert "error: no abstention threshold keeps the share of wrong answers within 0.05" in result.stderr
    assert "The rest of the calibration was written into the adapter; it will never abstain" in result.stderr
    found = read_config(tmp_path / "colours").calibration
    assert found is not None
    assert found.abstain is None
    assert json.loads(result.stdout)["temperature"] == read_config(tmp_path / "colours").temperature


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_samples": 1}, r"num_samples 1 \(calibrated with 8\)"),
        ({"num_samples": "auto"}, r"num_samples auto \(calibrated with 8\)"),
        ({"seed": 3}, r"seed 3 \(calibrated with 0\)"),
        ({"method": "linearized"}, r"method linearized \(calibrated with monte_carlo\)"),
        ({"choices": ["red", "blue"]}, r"choices \(calibrated with all of the adapter's\)"),
    ],
)
def test_thresholds_are_not_used_for_another_predictive_than_theirs(
    client: TestClient, changes: dict[str, Any], said: str
) -> None:
    answer = client.post("/predict", json={"inputs": "xx"} | changes).json()
    (prediction,) = answer["predictions"]
    assert (prediction["prediction_set"], prediction["abstain"]) == (None, None)
    assert re.search(f"prediction_set and abstain are null, because this request uses {said}", " ".join(answer["warnings"]))
    asked = client.post("/predict", json={"inputs": "xx", "coverage": 0.9} | changes)
    assert asked.status_code == 422
    assert re.search(f"coverage: .*{said}", asked.json()["detail"])


@pytest.mark.parametrize("level", ["high", "0", "1.5", "0.90", "nan"])
def test_a_calibration_with_a_level_that_is_none_is_refused(calibrated: Path, level: str) -> None:
    config = json.loads((calibrated / "colours" / "adapter_config.json").read_text())
    config["calibration"]["thresholds"]["lac"][level] = 0.5
    with pytest.raises(ValueError, match=f"thresholds for the level '{level}'"):
        AdapterConfig.model_validate(config)
