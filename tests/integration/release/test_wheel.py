"""The wheel as a user gets it: built by `python -m build`, installed into an empty environment, served from there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from scalabl import __version__
from tests.integration.support.checkout import ROOT, copy_of_checkout
from tests.integration.support.process import Served, free_port, wait_until_ready, write_models

pytestmark = pytest.mark.integration


def run(*command: str | Path, cwd: Path, seconds: float = 1200) -> str:
    variables = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SCALABL_", "VIRTUAL_ENV"))
    }
    done = subprocess.run([*map(str, command)], cwd=cwd, env=variables, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout.strip()


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel and what it asks for, and nothing of this one."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    copy_of_checkout(source)
    run(sys.executable, "-m", "build", "--outdir", folder / "dist", source, cwd=folder)
    built = sorted(path.name for path in (folder / "dist").iterdir())
    assert built == [f"scalabl-{__version__}-py3-none-any.whl", f"scalabl-{__version__}.tar.gz"]
    made = folder / "environment"
    run(sys.executable, "-m", "venv", made, cwd=folder)
    wheel = folder / "dist" / built[0]
    started = time.monotonic()
    install = [made / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    run(*install, "-c", ROOT / "constraints.txt", f"{wheel}[postgres,otel]", cwd=folder)
    print(f"\nwheel of {wheel.stat().st_size / 1e3:.0f} kB installed in {time.monotonic() - started:.0f} s")
    return made


def test_it_is_whole(environment: Path, tmp_path: Path) -> None:
    assert run(environment / "bin" / "scalabl", "--version", cwd=tmp_path) == f"scalabl {__version__}"
    assert run(environment / "bin" / "python", "-m", "pip", "check", cwd=tmp_path) == "No broken requirements found."
    where = (
        "import scalabl_kernels, scalabl, scalabl_server\n"
        "print(*[package.__file__ for package in (scalabl_kernels, scalabl, scalabl_server)], sep='\\n')"
    )
    files = run(environment / "bin" / "python", "-c", where, cwd=tmp_path).splitlines()
    assert all(Path(file).is_relative_to(environment) for file in files)


def test_it_serves(environment: Path, tmp_path: Path) -> None:
    models, port = write_models(tmp_path / "models"), free_port()
    command = [environment / "bin" / "scalabl", "serve", "--port", str(port), "--data-dir", tmp_path / "data"]
    command += ["--model", models / "base", "--adapter", models / "colours", "--threads", "1"]
    variables = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    log = tmp_path / "log"
    with log.open("wb") as errors:
        process = subprocess.Popen([*map(str, command)], cwd=tmp_path, env=variables, stderr=errors)
    server = Served(process, port, log)
    try:
        wait_until_ready(server, 120)
        (prediction,) = httpx.post(f"{server.url}/predict", json={"inputs": "a text"}, timeout=60).json()["predictions"]
        assert prediction["recorded"] is True  # the migrations of the database are in the wheel
        label = {"id": prediction["id"], "label": prediction["prediction"]}
        assert httpx.post(f"{server.url}/feedback", json=label, timeout=60).status_code == 200
        assert server.stop() == 0
    finally:
        process.kill()
        process.wait(60)
