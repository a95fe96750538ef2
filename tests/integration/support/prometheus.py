"""A real Prometheus and a real Alertmanager of the test's own."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.processes.port import free_port


@contextmanager
def prometheus(folder: Path, config: Mapping[str, Any]) -> Iterator[httpx.Client]:
    """A Prometheus with this configuration; skips where it is not installed."""
    (folder / "prometheus.yml").write_text(json.dumps(config), encoding="utf-8")
    arguments = [f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/tsdb"]
    with (
        _running("prometheus", folder, *arguments) as address,
        httpx.Client(base_url=f"http://{address}", timeout=30) as client,
    ):
        yield client


@contextmanager
def alertmanager(folder: Path) -> Iterator[str]:
    """An Alertmanager that keeps what it gets to itself; its address."""
    config = {"route": {"receiver": "nobody", "group_wait": "1s"}, "receivers": [{"name": "nobody"}]}
    (folder / "alertmanager.yml").write_text(json.dumps(config), encoding="utf-8")
    arguments = [f"--config.file={folder}/alertmanager.yml", f"--storage.path={folder}/alertmanager"]
    arguments.append("--cluster.listen-address=")
    with _running("prometheus-alertmanager", folder, *arguments) as address:
        yield address


@contextmanager
def _running(name: str, folder: Path, *arguments: str) -> Iterator[str]:
    program = shutil.which(name)
    if program is None:
        pytest.skip(f"{name} is missing; apt-get install {name}")
    address = f"127.0.0.1:{free_port()}"
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen([program, *arguments, f"--web.listen-address={address}"], stdout=log, stderr=log)
    try:
        yield address
    finally:
        process.kill()
        process.wait(30)


def query(client: httpx.Client, expression: str) -> list[dict[str, Any]]:
    """The series that an expression gives now; none while Prometheus starts."""
    try:
        response = client.post("/api/v1/query", data={"query": expression})
    except httpx.TransportError:
        return []
    if response.status_code == 503:
        return []
    assert response.status_code == 200, response.text
    return list(response.json()["data"]["result"])
