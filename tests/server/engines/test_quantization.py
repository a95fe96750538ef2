"""A server with a quantized base model reports what that changes, and its answers agree with the report."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from pydantic import ValidationError
from scalabl_server.cli.main import app
from typer.testing import CliRunner

from scalabl.evaluation.precision_change import QUERIES
from tests.server.conftest import settings_for

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="int8 products are an x86 processor's")


def test_the_change_is_in_info_and_the_log(serve: Callable[..., TestClient], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        client = serve(quantization="int8", num_samples=4)
    info = client.get("/info").json()
    assert info["model"]["quantization"] == "int8"
    change = info["adapter"]["quantization_change"]
    assert (change["inputs"], change["num_samples"]) == (len(QUERIES), 4)
    assert 0 < change["probability_largest"] < 0.2
    (line,) = [record.message for record in caplog.records if ": int8: " in record.message]
    assert line.startswith("adapter colours: int8: on 8 probe inputs and 4 samples probabilities change by at most ")


def test_answers_are_near_those_of_full_precision(serve: Callable[..., TestClient], colours: TestClient) -> None:
    quantised = serve(quantization="int8")
    for method in ("monte_carlo", "linearized"):
        body = {"inputs": QUERIES[0], "method": method}
        found, expected = (
            list(client.post("/predict", json=body).json()["predictions"][0]["probabilities"].values())
            for client in (quantised, colours)
        )
        assert found != expected
        assert found == pytest.approx(expected, abs=0.1)


def test_without_it_nothing_is_said(colours: TestClient) -> None:
    info = colours.get("/info").json()
    assert info["model"]["quantization"] is None
    assert info["adapter"]["quantization_change"] is None


def test_probes_without_a_use_are_refused(folders: Path) -> None:
    with pytest.raises(ValidationError, match="--probe-file has an effect only with --quantization, which is not set"):
        settings_for(folders, probe_file="x.jsonl")


def test_evaluate_takes_it_too(folders: Path, tmp_path: Path) -> None:
    rows = [{"text": f"row {n}", "choices": ["red", "green", "blue"], "answer": n % 3} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    reports = []
    for more in ([], ["--quantization", "int8"]):
        command = ["evaluate", "--adapter", str(folders / "colours"), "--model", str(folders / "base")]
        command += ["--data", str(tmp_path / "rows.jsonl"), "--num-samples", "4", "--bootstrap", "0", "--device", "cpu"]
        command += ["--output", str(tmp_path / "report.json"), *more]
        assert CliRunner().invoke(app, command, catch_exceptions=False).exit_code == 0
        reports.append(json.loads((tmp_path / "report.json").read_text(encoding="utf-8")))
    assert [report["quantization"] for report in reports] == [None, "int8"]
    assert reports[0] != reports[1] | {"quantization": None}
