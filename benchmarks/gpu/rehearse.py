"""A dry run in a clean virtual environment that has what the machine with the GPU has, and the carried wheels beside it.

python -m benchmarks.gpu.rehearse [--python python3.12] [--environment build/gpu-environment]

Run `python -m benchmarks.gpu.collect` before it. The environment is made once and has 6 GB: torch for CUDA 13, which the
machine has, works without a GPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MACHINE = (
    "torch==2.11.0",
    "triton==3.6.0",
    "transformers==5.17.0",
    "huggingface_hub==1.33.0",
    "accelerate==1.15.0",
    "safetensors==0.8.0",
    "peft",
    "scipy",
    "pytest",
    "pytest-xdist",
    "hypothesis",
    "prometheus-client",
    # The machine has NumPy 2.5, with which the interpreter of Triton 3.6 does not work. Only the dry run needs that.
    "numpy<2.4",
)
# What comes along with those and may be missing on the machine: the carried wheels have to bring it.
REMOVED = ("pydantic", "pydantic-core", "typing-inspection", "annotated-types", "typer", "httpx", "httpcore", "h11")


def main() -> None:
    """Make the environment if it is not there, and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--python", default="python3.12", help="an interpreter of Python 3.12")
    parser.add_argument("--environment", type=Path, default=ROOT / "build" / "gpu-environment")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu-rehearsal", help="a folder for the results")
    options = parser.parse_args()
    python = options.environment / "bin" / "python"
    if not (ready := options.environment / ".ready").exists():
        subprocess.run([options.python, "-m", "venv", "--clear", str(options.environment)], check=True)
        pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", *MACHINE], check=True)
        subprocess.run([*pip, "uninstall", "--yes", *REMOVED], check=True)
        ready.touch()
    command = ["bash", str(ROOT / "benchmarks" / "gpu" / "run.sh"), "--dry-run", "--output", str(options.output.absolute())]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    sys.exit(subprocess.run(command, env=environment | {"PYTHON": str(python.absolute())}, check=False).returncode)


if __name__ == "__main__":
    main()
