"""`scalabl serve` as a process of its own, with its log, its metrics and its memory. No client for load: see `load`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes.port import answers, free_port


@dataclass(frozen=True)
class Server:
    """A server that is ready. `log`: its standard error, one JSON object a line."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def requests(self) -> list[dict[str, object]]:
        """The log's lines about predictions."""
        lines = [json.loads(line) for line in self.log.read_text(encoding="utf-8").splitlines() if line.startswith("{")]
        return [line for line in lines if line.get("route") == "/predict"]

    def get(self, path: str) -> bytes:
        """The body of an answer."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as response:
            content: bytes = response.read()
        return content

    def rss(self) -> int:
        """Resident bytes."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def serving(folder: Path, seconds: float = 300, **settings: object) -> Iterator[Server]:
    """`scalabl serve` with these settings, until the context ends. Its data and its log lie in `folder`.

    Raises:
        RuntimeError: it has ended, or is not ready in so many seconds.
    """
    port = free_port()
    flags = {"port": port, "data_dir": folder, "log_format": "json"} | settings
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SCALABL_")}
    log = folder / "server.log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "scalabl_server.cli", "serve", *arguments], stderr=errors, env=environment
        )
    try:
        deadline = time.monotonic() + seconds
        while not answers(f"http://127.0.0.1:{port}/health/ready"):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server is not ready; its log says:\n{log.read_text(encoding='utf-8')[-3000:]}")
            time.sleep(0.1)
        yield Server(process, port, log)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    finally:
        process.kill()
        process.wait()
