"""A real `scalabl serve` process on a tiny model, for tests over real sockets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks.processes.port import free_port
from tests import tiny


@dataclass
class Served:
    """A server that is ready. `log` is its standard error, whole once it has ended."""

    process: subprocess.Popen[bytes]
    port: int
    log_file: Path
    admin_port: int | None = None
    scheme: str = "http"
    settings: dict[str, object] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self.log_file.read_text(encoding="utf-8")

    def stop(self, seconds: float = 60) -> int:
        """SIGTERM, and the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


@contextmanager
def served(
    folder: Path, adapter: str = "colours", seconds: float = 120, module: str = "scalabl_server.cli", **settings: object
) -> Iterator[Served]:
    """Serve an adapter of `write_models(folder)` with these settings until the context ends; True: a flag without value."""
    port = free_port()
    options = {"model": folder / "base", "adapter": folder / adapter, "port": port, "device": "cpu", "threads": 1}
    options |= {"warmup": "quick"} | settings
    flags = {f"--{name.replace('_', '-')}": value for name, value in options.items()}
    arguments = [flag if value is True else f"{flag}={value}" for flag, value in flags.items()]
    log = folder / f"server-{port}.log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SCALABL_")}
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", module, "serve", *arguments],
            stderr=errors,
            env=environment | {"HF_HUB_OFFLINE": "1"},
        )
    admin = settings.get("admin_port")
    server = Served(process, port, log, int(str(admin)) if admin is not None else None, settings=dict(options))
    server.scheme = "https" if "ssl_certfile" in settings else "http"
    try:
        wait_until_ready(server, seconds)
        yield server
    finally:
        process.kill()
        process.wait(60)


def wait_until_ready(server: Served, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    url = server.url if server.admin_port is None else f"http://127.0.0.1:{server.admin_port}"
    while True:
        assert server.process.poll() is None, server.log
        assert time.monotonic() < deadline, f"not ready within {seconds} s:\n{server.log}"
        try:
            if httpx.get(f"{url}/health/ready", verify=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)


def write_models(folder: Path) -> Path:
    """`base`, and for it the adapters `colours` (classification) and `letters` (multiple choice)."""
    tiny.write_base(folder / "base")
    tiny.write_adapter(folder / "colours")
    tiny.write_adapter(folder / "letters", task=tiny.MULTIPLE_CHOICE)
    return folder
