"""A process with a time limit: its end, its death, and what it started when the time is up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[3]

# Forking is done in a process without threads.
FRAME = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from benchmarks.gpu.supervision import limited
folder = Path(sys.argv[1])
{work}
began = time.monotonic()
code = limited(work, {seconds}, folder / "log")
print(json.dumps([code, time.monotonic() - began]))
"""


def run(work: str, folder: Path, seconds: float = 30) -> tuple[int | None, float]:
    script = FRAME.format(work=work, seconds=seconds)
    done = subprocess.run([sys.executable, "-c", script, str(folder)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ended: list[Any] = json.loads(done.stdout)
    return ended[0], ended[1]


@pytest.mark.parametrize(
    ("work", "code"),
    [
        ("def work(): print('said')", 0),
        ("def work(): raise ValueError('said')", 1),
        ("def work(): print('said', flush=True); os.kill(os.getpid(), signal.SIGKILL)", -9),
    ],
    ids=["returns", "raises", "is killed"],
)
def test_it_tells_how_the_work_ended_and_keeps_what_it_said(work: str, code: int, tmp_path: Path) -> None:
    assert run(work, tmp_path)[0] == code
    assert "said" in (tmp_path / "log").read_text(encoding="utf-8")


def test_when_the_time_is_up_everything_that_was_started_ends(tmp_path: Path) -> None:
    work = (
        "def work():\n"
        "    started = subprocess.Popen(['sleep', '60'])\n"
        "    (folder / 'pid').write_text(str(started.pid))\n"
        "    time.sleep(60)\n"
    )
    code, seconds = run(work, tmp_path, seconds=1)
    assert code is None
    assert seconds < 20
    pid = int((tmp_path / "pid").read_text(encoding="utf-8"))
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_work_that_ignores_the_request_to_end_is_killed(tmp_path: Path) -> None:
    work = "def work():\n    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n    time.sleep(60)\n"
    code, seconds = run(work, tmp_path, seconds=0.5)
    assert code is None
    assert seconds < 20
