"""Real replicas on a tiny model, and the real databases behind them: SQLite files and a PostgreSQL of the test's own."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.processes.port import free_port


def wait_until(condition: Callable[[], bool], seconds: float = 60, pause: float = 0.02) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(pause)


class Replica:
    """One `scalabl serve`, which keeps its port and its name over restarts.

    Args:
        prefix: what runs the command, such as `unshare`.
    """

    def __init__(
        self,
        models: Path,
        name: str,
        url: str,
        *arguments: str,
        prefix: Sequence[str] = (),
        env: dict[str, str] | None = None,
    ) -> None:
        self.port = free_port()
        self.address = f"127.0.0.1:{self.port}"
        self._command = [
            *prefix, str(Path(sys.executable).with_name("scalabl")), "serve", "--model", str(models / "base"),
            "--adapter", str(models / "colours"), "--device", "cpu", "--threads", "1", "--port", str(self.port),
            "--replica-id", name, "--outcomes-url", url, "--num-samples", "4", "--log-level", "warning", *arguments,
        ]  # fmt: skip
        self._env = os.environ | {"HF_HUB_OFFLINE": "1"} | (env or {})
        self.log = models / f"{name}.log"
        self.client = httpx.Client(base_url=f"http://{self.address}", timeout=60)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begin; see `wait`."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self._command, env=self._env, stdout=log, stderr=log)

    def wait(self, path: str = "/health/ready", seconds: float = 120) -> None:
        """Until a GET of this path is answered 200."""

        def answers() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text()
            try:
                return self.client.get(path).status_code == 200
            except httpx.TransportError:
                return False

        wait_until(answers, seconds, 0.05)

    def kill(self) -> None:
        """As a crash does it."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)

    def terminate(self) -> int:
        """As an operator does it; returns the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()
        self.client.close()

    def predict(self, inputs: str | list[str]) -> list[dict[str, Any]]:
        response = self.client.post("/predict", json={"inputs": inputs})
        assert response.status_code == 200, response.text
        return list(response.json()["predictions"])

    def feedback(self, labels: Sequence[tuple[str, str | None]]) -> httpx.Response:
        return self.client.post("/feedback", json=[{"id": name, "label": label} for name, label in labels])

    def totals(self) -> dict[str, float]:
        """Each counter and gauge, summed over its labels."""
        sums: dict[str, float] = {}
        for family in text_string_to_metric_families(self.client.get("/metrics").text):
            for sample in family.samples:
                sums[sample.name] = sums.get(sample.name, 0) + sample.value
        return sums


@contextmanager
def running(*replicas: Replica) -> Iterator[None]:
    """Started and ready; killed in the end."""
    try:
        for replica in replicas:
            replica.start()
        for replica in replicas:
            replica.wait()
        yield
    finally:
        for replica in replicas:
            replica.close()


class Postgres:
    """A cluster in a folder of its own, run by an unprivileged user on a free port."""

    def __init__(self) -> None:
        folders = [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
        folders += [Path(program).parent for program in [shutil.which("initdb")] if program]
        self._bin = next(
            (folder for folder in folders if (folder / "initdb").exists() and (folder / "pg_ctl").exists()), None
        )
        if self._bin is None:
            pytest.skip("initdb and pg_ctl are missing; apt-get install postgresql")
        # PostgreSQL refuses to run as root, and pytest's own folders are closed to others.
        self._user: dict[str, Any] = {"user": "nobody", "group": "nogroup"} if os.geteuid() == 0 else {}
        self._folder = Path(tempfile.mkdtemp(prefix="scalabl-postgres-"))
        self._folder.chmod(0o755)
        self.port = free_port()
        self.url = f"postgresql://tester@127.0.0.1:{self.port}/postgres"
        if self._user:
            shutil.chown(self._folder, "nobody", "nogroup")
        self._run("initdb", "-D", self._data, "-U", "tester", "-A", "trust", "-E", "UTF8", "--no-instructions")

    @property
    def _data(self) -> str:
        return str(self._folder / "data")

    def _run(self, program: str, *arguments: str) -> None:
        assert self._bin is not None
        command = [str(self._bin / program), *arguments]
        done = subprocess.run(command, capture_output=True, cwd=self._folder, timeout=120, **self._user)
        assert done.returncode == 0, done.stdout + done.stderr

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -k {self._folder}"
        log = str(self._folder / "log")
        assert self._bin is not None
        command = [str(self._bin / "pg_ctl"), "-D", self._data, "-l", log, "-w", "-o", options, "start"]
        # Its descendants keep what they inherit, so that a pipe would never end.
        subprocess.run(
            command, check=True, cwd=self._folder, timeout=120, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            **self._user,
        )  # fmt: skip

    def stop(self) -> None:
        """At once, as a crash does it."""
        self._run("pg_ctl", "-D", self._data, "-m", "immediate", "-w", "stop")

    def close(self) -> None:
        if (self._folder / "data" / "postmaster.pid").exists():
            self.stop()
        shutil.rmtree(self._folder, ignore_errors=True)


@contextmanager
def postgres() -> Iterator[Postgres]:
    """A running PostgreSQL; skips where it is not installed."""
    database = Postgres()
    try:
        database.start()
        yield database
    finally:
        database.close()
