"""`benchmarks.load` on the tiny model: every part runs against a real server, and its results are consistent."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.support.process import write_models

pytestmark = pytest.mark.integration

pytest.importorskip("matplotlib", reason="matplotlib is not installed; the extra 'plots' brings it")


def test_every_part_is_measured_and_saved(tmp_path: Path) -> None:
    folder, output = write_models(tmp_path), tmp_path / "output"
    command = [sys.executable, "-m", "benchmarks.load", "--model", str(folder / "base"), "--adapter"]
    command += [str(folder / "colours"), "--output", str(output), "--load-requests", "40", "--load-rounds", "2"]
    command += ["--levels", "50,300", "--soak", "1500"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    results = json.loads((output / "load.json").read_text(encoding="utf-8"))["load"]
    client = results["client"]
    assert 0 < client["stages"]["inference_seconds"]["median"] < client["wall"]["median"]
    assert client["added"]["median"] >= client["added_inside"]["median"] > 0
    saturation = results["saturation"]
    shares = [served / alone for served, alone in zip(saturation["server_rounds"], saturation["engine_rounds"], strict=True)]
    assert saturation["share_of_engine"]["median"] == pytest.approx(statistics.median(shares))
    assert min(shares) > 0
    low, high = results["levels"]
    assert low["statuses"] == {"200": 40}
    assert sum(high["statuses"].values()) == 40
    assert high["offered"] == pytest.approx(6 * low["offered"])
    assert [at for at, _ in results["soak"]["rss"]] == [1000, 1500]
    assert (output / "serving-load.png").stat().st_size > 10_000
    assert (output / "load.txt").read_text(encoding="utf-8") == done.stdout
