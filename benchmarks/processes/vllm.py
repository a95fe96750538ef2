"""A real vLLM server on this CPU, from an environment that has vLLM. Installing one is `make integration-vllm`'s."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.processes.port import answers, free_port


@dataclass
class Vllm:
    """One server on a port of its own, which can be started again after it was killed.

    Attributes:
        interpreter: Python of the environment that has vLLM.
        loras: name=folder, for --lora-modules; without any it loads them at run time.
        max_tokens: of a prompt and what follows it.
        more: arguments beside these.
    """

    base: Path
    log: Path
    interpreter: str
    loras: list[str] = field(default_factory=list)
    max_loras: int = 10
    max_tokens: int = 256
    more: tuple[str, ...] = ()
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
                [self.interpreter, "-m", "vllm.entrypoints.openai.api_server", *arguments],
                stdout=output,
                stderr=output,
                cwd=self.log.parent,
                env=environment,
                start_new_session=True,
            )

    def wait(self, seconds: float = 600) -> None:
        """Until it answers."""
        deadline = time.monotonic() + seconds
        while not answers(f"{self.url}/health"):
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text(encoding="utf-8")[-5000:]
            assert time.monotonic() < deadline, f"not ready within {seconds} s"
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
