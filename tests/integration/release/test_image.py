"""The image, built from the Dockerfile and run as intended: unprivileged, with a read-only root, as process 1."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.processes.port import free_port
from scalabl import __version__
from tests.integration.support import container
from tests.integration.support.checkout import ROOT, copy_of_checkout
from tests.integration.support.container import Container

pytestmark = pytest.mark.integration

COMPILERS = ("gcc", "cc", "g++", "clang", "make", "ld", "as", "tcc", "rustc")
ADAPTER = ROOT / "examples" / "intent_router" / "adapter"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's base model, readable for everyone, as `make models` leaves it."""
    folder = os.environ.get("SCALABL_EXAMPLE_BASE")
    if folder is None:
        pytest.skip("SCALABL_EXAMPLE_BASE is not set; run `make integration`, which fetches the example's base model")
    copy = tmp_path_factory.mktemp("models") / "base"
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)
    return copy


@pytest.fixture(scope="module")
def built(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Built from the files that git knows, with the example's adapter baked in; the base model comes as a volume."""
    container.require_tools()
    context = tmp_path_factory.mktemp("context")
    copy_of_checkout(context)
    models = context / "models"
    shutil.copytree(ADAPTER, models / "adapters" / "intent-router")
    (models / "base").mkdir()
    parent = container.base_image()
    started = time.monotonic()
    container.build(context, BASE_IMAGE=parent, TORCH_INDEX="", MODELS="models", REVISION="test")
    print(f"\nbuilt in {time.monotonic() - started:.0f} s; ", end="")
    whole, below = container.size_of(container.IMAGE), container.size_of(parent)
    print(f"{whole / 1e6:.0f} MB, {(whole - below) / 1e6:.0f} MB above its base image")
    assert whole - below < 1.6e9
    with container.image() as image:
        yield image


@pytest.fixture
def running(built: tuple[Path, dict[str, Any]], base: Path, tmp_path: Path) -> Iterator[Container]:
    root, config = built
    data = tmp_path / "data"
    data.mkdir()
    os.chown(data, 10001, 10001)
    environment = {
        "SCALABL_PORT": str(free_port()),
        "SCALABL_MODEL": "/models/base",
        "SCALABL_ADAPTER": "/models/adapters/intent-router",
        "SCALABL_THREADS": "2",
        "SCALABL_REQUEST_TIMEOUT": "180",  # a machine with other work
        "SCALABL_SHUTDOWN_TIMEOUT": "180",
        "SCALABL_DRAIN_DELAY": "8",  # for the health check to be asked meanwhile
    }
    server = Container(root, config, environment, {"/models/base": base, "/data": data})
    try:
        yield server
    finally:
        server.close()


def wait_until_ready(server: Container, seconds: float = 180) -> tuple[str, float]:
    """Its URL, and the seconds until it was ready."""
    url = f"http://127.0.0.1:{server.environment['SCALABL_PORT']}"
    started = time.monotonic()
    while time.monotonic() < started + seconds:
        assert server.process.poll() is None, server.log
        try:
            if httpx.get(f"{url}/health/ready").status_code == 200:
                return url, time.monotonic() - started
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"not ready within {seconds} s:\n{server.log}")


def test_its_metadata_are_the_dockerfiles(built: tuple[Path, dict[str, Any]]) -> None:
    _, config = built
    assert config["User"] == "10001:10001"
    assert (config["Entrypoint"], config["Cmd"]) == (["scalabl"], ["serve"])
    assert config["Healthcheck"]["Test"] == ["CMD", "python", "-m", "scalabl_server.healthcheck"]
    assert list(config["ExposedPorts"]) == ["8000/tcp"]
    assert list(config["Volumes"]) == ["/data"]
    assert config["Labels"]["org.opencontainers.image.version"] == __version__
    assert config["Labels"]["org.opencontainers.image.revision"] == "test"


def test_it_holds_no_compiler_no_cache_and_no_build(built: tuple[Path, dict[str, Any]]) -> None:
    root, _ = built
    folders = ("usr/bin", "bin", "usr/local/bin", "opt/scalabl/bin")
    assert [name for folder in folders for name in COMPILERS if (root / folder / name).exists()] == []
    assert not list((root / "opt/scalabl/bin").glob("pip*"))
    assert not (root / "build").exists()
    assert not list((root / "opt").rglob("torch/include"))
    for folder in ("root/.cache", "var/cache/apt", "var/lib/apt/lists", "tmp", "data"):
        files = [path for path in (root / folder).rglob("*") if path.is_file()] if (root / folder).exists() else []
        assert files == [], folder
    assert not list((root / "opt").rglob("*.whl"))
    assert not list((root / "opt").rglob("triton"))  # only the CUDA variant uses it
    assert sorted(path.name for path in (root / "models").iterdir()) == ["adapters", "base"]
    # Nothing of it can be changed by the user that it runs as.
    owned = [
        path
        for path in (root / "opt").rglob("*")
        if path.lstat().st_uid != 0 or (path.lstat().st_mode & 0o022 and not path.is_symlink())
    ]
    assert owned == []


def test_it_serves_the_example_unprivileged_over_a_read_only_root(running: Container) -> None:
    url, seconds = wait_until_ready(running)
    print(f"\nready after {seconds:.1f} s, {running.processor_seconds():.1f} s of processor time")
    status = running.status()
    assert status["Uid"].split() == ["10001"] * 4
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"] == "1"
    assert status["NSpid"].split()[-1] == "1"
    assert "ro" in running.root_options()
    refused = running.execute("touch", "/opt/scalabl/written", root=True)
    assert "Read-only file system" in refused.stderr

    assert running.health_check().returncode == 0, running.health_check().stderr
    answer = httpx.post(f"{url}/predict", json={"inputs": "how do i move money to my savings account"}, timeout=60).json()
    (prediction,) = answer["predictions"]
    assert answer["adapter"] == "intent-router"
    assert (prediction["prediction"], prediction["recorded"]) == ("banking", True)
    label = {"id": prediction["id"], "label": "banking"}
    assert httpx.post(f"{url}/feedback", json=label, timeout=60).status_code == 200
    assert f'version="{__version__}"' in httpx.get(f"{url}/metrics").text
    version = running.execute("scalabl", "--version")
    assert version.stdout == f"scalabl {__version__}\n", version.stderr


def test_it_drains_on_its_stop_signal_and_ends_with_0(running: Container) -> None:
    url, _ = wait_until_ready(running)
    with ThreadPoolExecutor(1) as pool:
        body = {"inputs": ["how do i move money to my savings account"] * 64, "num_samples": 4}
        accepted = pool.submit(httpx.post, f"{url}/predict", json=body, timeout=200)
        deadline = time.monotonic() + 120
        while "scalabl_batch_rows_count 0.0" in httpx.get(f"{url}/metrics").text:  # until its first pass has ended
            assert time.monotonic() < deadline
        started = time.monotonic()
        with ThreadPoolExecutor(1) as stopping:
            stopped = stopping.submit(running.stop, 200)
            while httpx.get(f"{url}/health/ready").status_code != 503:
                assert time.monotonic() < deadline
            assert running.health_check().returncode == 1
            assert accepted.result().status_code == 200
            assert stopped.result() == 0, running.log
    print(f"\ndrained in {time.monotonic() - started:.1f} s")


def test_without_an_adapter_it_says_which_variable_is_missing(built: tuple[Path, dict[str, Any]], base: Path) -> None:
    root, config = built
    server = Container(root, config, {}, {"/models/base": base})
    try:
        assert server.process.wait(60) == 2
        assert "--adapter" in server.log
    finally:
        server.close()
