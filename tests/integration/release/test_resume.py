"""`scalabl train`, killed in an epoch and started again, gives the weights of an uninterrupted run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from scalabl.files.adapter_directory import read_weights
from tests import tiny

pytestmark = pytest.mark.integration

SECONDS = 120


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A base model and 200 rows: an epoch of 50 steps of four."""
    tiny.write_base(tmp_path / "base")
    colours = list(tiny.CLASSIFICATION.choices)
    rows = [{"text": "xyz"[i % 3] * (1 + i % 5), "choices": colours, "answer": i % 3} for i in range(200)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def _train(work: Path, output: Path) -> subprocess.Popen[bytes]:
    arguments = {
        "model": work / "base",
        "train": work / "rows.jsonl",
        "validation": work / "rows.jsonl",
        "output": output,
        "max-steps": 110,
        "eval-steps": 20,
        "batch-size": 4,
        "r": 4,
    }
    with (output.parent / f"{output.name}.log").open("wb") as log:
        return subprocess.Popen(
            [
                sys.executable,
                "-m",
                "scalabl_server.cli",
                "train",
                *(f"--{name}={value}" for name, value in arguments.items()),
            ],
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=log,
        )


def test_a_killed_training_resumes_to_the_uninterrupted_run_s_weights(work: Path) -> None:
    assert _train(work, work / "whole").wait(SECONDS) == 0
    for last in (20, 60):  # twice: in the first epoch, and in the second
        process = _train(work, work / "killed")
        state = work / "killed" / "checkpoints" / f"checkpoint-{last}" / "trainer_state.json"
        deadline = time.monotonic() + SECONDS
        while not state.is_file():
            assert process.poll() is None, (work / "killed.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        assert process.wait(SECONDS) == -signal.SIGKILL
        assert not (work / "killed" / "adapter_model.safetensors").exists(), "it had not finished"
    assert _train(work, work / "killed").wait(SECONDS) == 0
    whole, resumed = read_weights(work / "whole"), read_weights(work / "killed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert json.loads((work / "killed" / "adapter_config.json").read_text()) == json.loads(
        (work / "whole" / "adapter_config.json").read_text()
    )
