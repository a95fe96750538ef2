"""The wheel as a user gets it: built by `python -m build`, installed into an empty environment, served from there, alone and
next to Hugging Face's package `kernels`, which transformers imports."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from benchmarks.processes.port import free_port
from scalabl import __version__
from tests.integration.support.checkout import ROOT, copy_of_checkout
from tests.integration.support.process import Served, wait_until_ready, write_models

pytestmark = pytest.mark.integration


# The newest on the package registry, and a version that transformers 5.23 imports; it ignores those before 0.18.2.
KERNELS, IMPORTED_KERNELS = "0.17.2", "0.18.2"
# `PreTrainedModel` comes from the part of transformers that looks for `kernels`.
IMPORTS = """
import sys, transformers
from transformers import PreTrainedModel
print("kernels" in sys.modules)
import kernels, scalabl, scalabl_server, scalabl_kernels
print(kernels.__version__, callable(kernels.get_kernel))
print(*(package.__file__ for package in (kernels, scalabl_server, scalabl_kernels, scalabl)), sep="\\n")
"""


def run(*command: str | Path, cwd: Path, seconds: float = 1200) -> str:
    variables = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "SCALABL_", "VIRTUAL_ENV"))
    }
    done = subprocess.run([*map(str, command)], cwd=cwd, env=variables, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    copy_of_checkout(source)
    run(sys.executable, "-m", "build", "--outdir", folder / "dist", source, cwd=folder)
    built = sorted(path.name for path in (folder / "dist").iterdir())
    assert built == [f"scalabl-{__version__}-py3-none-any.whl", f"scalabl-{__version__}.tar.gz"]
    return folder / "dist" / built[0]


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel and what it asks for, and nothing of this one."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", folder, cwd=folder)
    started = time.monotonic()
    install(folder, f"{wheel}[postgres,otel]")
    print(f"\nwheel of {wheel.stat().st_size / 1e3:.0f} kB installed in {time.monotonic() - started:.0f} s")
    return folder


@pytest.fixture(scope="module")
def kernels_wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Version -> Hugging Face's wheel; the second is the first with its metadata raised to that version."""
    folder = tmp_path_factory.mktemp("kernels")
    download = ["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    run(sys.executable, *download, "--dest", folder, f"kernels=={KERNELS}", cwd=folder)
    (original,) = folder.glob("*.whl")
    raised = folder / original.name.replace(KERNELS, IMPORTED_KERNELS)
    with zipfile.ZipFile(original) as source, zipfile.ZipFile(raised, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith((".dist-info/METADATA", ".dist-info/RECORD")):
                content = content.replace(KERNELS.encode(), IMPORTED_KERNELS.encode())
            target.writestr(name.replace(f"-{KERNELS}.", f"-{IMPORTED_KERNELS}."), content)
    return {KERNELS: original, IMPORTED_KERNELS: raised}


def install(environment: Path, *packages: str | Path) -> None:
    command = ["-m", "pip", "--python", environment / "bin" / "python", "--disable-pip-version-check", "install", "--quiet"]
    run(sys.executable, *command, "-c", ROOT / "constraints.txt", *packages, cwd=environment)


def site_packages(environment: Path) -> Path:
    (folder,) = environment.glob("lib/python*/site-packages")
    return folder


@contextmanager
def serving(environment: Path, folder: Path) -> Iterator[Served]:
    """The environment's own `scalabl serve`, until the context ends."""
    models, port = write_models(folder / "models"), free_port()
    command = [environment / "bin" / "scalabl", "serve", "--port", str(port), "--data-dir", folder / "data"]
    command += ["--model", models / "base", "--adapter", models / "colours", "--threads", "1"]
    variables = {"PATH": os.environ["PATH"], "HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    log = folder / "log"
    with log.open("wb") as errors:
        process = subprocess.Popen([*map(str, command)], cwd=folder, env=variables, stderr=errors)
    server = Served(process, port, log)
    try:
        wait_until_ready(server, 120)
        yield server
    finally:
        process.kill()
        process.wait(60)


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
    with serving(environment, tmp_path) as server:
        (prediction,) = httpx.post(f"{server.url}/predict", json={"inputs": "a text"}, timeout=60).json()["predictions"]
        assert prediction["recorded"] is True  # the migrations of the database are in the wheel
        label = {"id": prediction["id"], "label": prediction["prediction"]}
        assert httpx.post(f"{server.url}/feedback", json=label, timeout=60).status_code == 200
        assert server.stop() == 0


@pytest.mark.parametrize("version", [KERNELS, IMPORTED_KERNELS])
@pytest.mark.parametrize("first", ["scalabl", "kernels"])
def test_it_works_next_to_hugging_faces_kernels(
    environment: Path, wheel: Path, kernels_wheels: dict[str, Path], first: str, version: str, tmp_path: Path
) -> None:
    """Both wheels lie in the same site-packages; what they depend on comes from the environment of the other tests."""
    both, elsewhere = tmp_path / "both", tmp_path / "elsewhere"
    run(sys.executable, "-m", "venv", "--without-pip", both, cwd=tmp_path)
    elsewhere.mkdir()
    (site_packages(both) / "dependencies.pth").write_text(f"{site_packages(environment)}\n", encoding="utf-8")
    # pip sees the other environment's copy of the wheel by that path, and would be content with it.
    steps = [("--force-reinstall", "--no-deps", wheel), (kernels_wheels[version],)]
    for step in steps if first == "scalabl" else reversed(steps):
        install(both, *step)
    for folder in (elsewhere, ROOT):
        imported_by_transformers, api, *files = run(both / "bin" / "python", "-c", IMPORTS, cwd=folder).splitlines()
        assert imported_by_transformers == str(version == IMPORTED_KERNELS)
        assert api == f"{version} True"
        *installed, scalabl = map(Path, files)
        assert all(file.is_relative_to(site_packages(both)) for file in installed)
        assert scalabl.is_relative_to(ROOT if folder == ROOT else site_packages(both))  # the root has a folder of that name
    with serving(both, elsewhere) as server:
        answer = httpx.post(f"{server.url}/predict", json={"inputs": "a text"}, timeout=60)
        assert answer.status_code == 200
        assert answer.json()["predictions"][0]["prediction"]
