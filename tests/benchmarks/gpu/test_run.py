"""The command for a machine with a GPU, rehearsed on this CPU: all parts, a failure in each, a kill in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.gpu.__main__ import PARTS
from benchmarks.gpu.page import Run, run_section
from benchmarks.gpu.tables import PARTS as SECTIONS

ROOT = Path(__file__).resolve().parents[3]
MOST_FILES = 8  # that come back from the machine

# Makes the first thing that each step of a part calls fail; the last part never ends.
PLANTED = """
import importlib, sys, time
from benchmarks.gpu.__main__ import main

def fail(*_, **__):
    raise RuntimeError("planted")

for module, names in {
    "fused_tests": ["run"],
    "models": ["load_published", "random_base"],
    "kernel": ["_row", "_alone"],
    "engine": ["random_llama"],
    "server": ["random_llama", "serving"],
    "profile": ["random_llama"],
}.items():
    part = importlib.import_module(f"benchmarks.gpu.parts.{module}")
    for name in names:
        assert hasattr(part, name), (module, name)
        setattr(part, name, fail)
importlib.import_module("benchmarks.gpu.parts.more").measure = lambda bench: time.sleep(600)
main()
"""


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SCALABL_", "TRITON_", "PYTEST_"))}
    return kept | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}/kernels:{ROOT}/server:{ROOT}"}


def results_in(folder: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")}


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rehearsal")
    command = ["bash", "benchmarks/gpu/run.sh", "--dry-run", "--output", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600, check=False)
    log = folder / "gpu.log"
    assert done.returncode == 0, done.stdout + done.stderr + log.read_text(encoding="utf-8")[-6000:]
    return folder


def test_a_dry_run_ends_well_in_every_part(rehearsed: Path) -> None:
    results = results_in(rehearsed)
    assert list(results["run"]["parts"]) == list(PARTS)
    assert {name: results[name]["status"] for name in PARTS} == dict.fromkeys(PARTS, "done")
    assert {name: results[name]["failures"] for name in PARTS} == {name: [] for name in PARTS}
    assert all(results[name]["dry_run"] for name in PARTS)
    assert results["correctness"]["results"]["fused"]["counts"] == {"passed": 2}
    assert {"ours", "peft", "base"} < set(results["kernel"]["results"]["forms"][0]["seconds"])
    assert set(results["engine"]["results"]) >= {"methods", "memory", "prefix", "trunk"}
    assert results["server"]["results"]["levels"][0]["statuses"]


def test_few_enough_files_come_back(rehearsed: Path) -> None:
    files = [path for path in rehearsed.rglob("*") if path.is_file()]
    assert len(files) <= MOST_FILES
    assert sum(path.stat().st_size for path in files) < 2**20


def test_the_page_shows_every_part_of_a_run(rehearsed: Path) -> None:
    results = results_in(rehearsed)
    text = run_section(Run("rehearsal", results["run"], {name: results[name] for name in SECTIONS}))
    for words in ("tiny llama", "added / floor", "over PEFT", "predicted, GiB", "requests per second", "busy"):
        assert words in text, words
    assert list(SECTIONS) == list(PARTS)
    assert text.count(" | done | ") == len(PARTS)


@dataclass(frozen=True)
class Killed:
    """What a run left that was killed in its last part, after all others had failed."""

    folder: Path
    said: str
    alive: list[psutil.Process]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-c", PLANTED, "--dry-run", "--output", str(folder)]
    started = environment() | {"TRITON_INTERPRET": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=started, stdout=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 300
        while not (folder / "more.json").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
    finally:
        process.send_signal(signal.SIGKILL)
        said, _ = process.communicate(timeout=30)
    _, alive = psutil.wait_procs(children, timeout=30)
    return Killed(folder, said, alive)


def test_a_failure_in_each_part_is_reported_and_stops_no_later_part(killed: Killed) -> None:
    results = results_in(killed.folder)
    *failed, last = PARTS
    assert list(results["run"]["parts"]) == failed
    for name in failed:
        assert results[name]["status"] == results["run"]["parts"][name]["status"] == "failed", name
        assert "planted" in results[name]["failures"][0]["error"], results[name]["failures"]
        assert f"{name:<12} failed" in killed.said
    assert last in results


def test_a_kill_leaves_valid_json_of_the_parts_before_and_no_process(killed: Killed) -> None:
    results = results_in(killed.folder)  # which reads every file
    assert set(results) == {"run", *PARTS}
    assert results["more"]["status"] == "running"
    assert results["kernel"]["results"]["ceilings"]["bandwidth"] > 0
    assert killed.alive == []
