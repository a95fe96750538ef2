"""Writes the image's requirement files: every package with the hashes of its files. Run by `make lock`; needs the network.

`requirements.txt` is for both variants of the image. `requirements-cpu.txt` has torch's CPU build. `requirements-cuda.txt`
has torch from PyPI, with the CUDA libraries and the Triton version that it requires. Other versions come from
constraints.txt, so that the image has the versions that are tested.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
EXTRAS = ("gguf", "otel", "postgres")
PYTHON = "3.11"  # as in the Dockerfile
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CUDA = re.compile(r"(torch|triton|nvidia-.+|cuda-.+)==")


def resolve() -> list[str]:
    """The entries of a requirement file for Linux and `PYTHON`, from the package index that uv is configured for."""
    constraints = (HERE.parent / "constraints.txt").read_text(encoding="utf-8")
    # torch from PyPI requires a Triton version of its own. The pinned version is for the CPU build, which requires none.
    constraints = re.sub(r"^triton==.*\n", "", constraints, flags=re.MULTILINE)
    command = [os.environ.get("UV", "uv"), "pip", "compile", "pyproject.toml", "--constraint", "-", "--generate-hashes"]
    command += ["--python-version", PYTHON, "--python-platform", "x86_64-manylinux_2_28"]
    command += ["--no-header", "--no-annotate", "--quiet"]
    command += [f"--extra={extra}" for extra in EXTRAS]
    done = subprocess.run(command, cwd=HERE.parent, input=constraints, stdout=subprocess.PIPE, text=True, check=True)
    return re.findall(r"^\S.*?(?=^\S|\Z)", done.stdout, flags=re.MULTILINE | re.DOTALL)


def cpu_torch(version: str, page: str) -> str:
    """The entry for torch's CPU build, with the hashes for Linux and `PYTHON` from the index's page.

    Raises:
        SystemExit: the index has no such build.
    """
    tag = "cp" + PYTHON.replace(".", "")
    wheel = rf"torch-{re.escape(version)}(?:%2B|\+)cpu-{tag}-{tag}-manylinux_2_28_(?:x86_64|aarch64)\.whl"
    hashes = sorted(set(re.findall(wheel + "#sha256=([0-9a-f]{64})", page)))
    if not hashes:
        raise SystemExit(f"the index has no torch {version}+cpu for {tag} on Linux")
    return " \\\n    ".join([f"torch=={version}+cpu", *(f"--hash=sha256:{digest}" for digest in hashes)]) + "\n"


def main() -> None:
    """Write the requirement files of both variants."""
    entries = resolve()
    version = next(entry for entry in entries if entry.startswith("torch==")).split()[0].removeprefix("torch==")
    index = sys.argv[1] if len(sys.argv) > 1 else CPU_INDEX
    with urllib.request.urlopen(f"{index}/torch/") as page:
        cpu = cpu_torch(version, page.read().decode())
    common, cuda = ([entry for entry in entries if bool(CUDA.match(entry)) == wanted] for wanted in (False, True))
    for name, text in (("", "".join(common)), ("-cpu", cpu), ("-cuda", "".join(cuda))):
        header = "# Written by docker/lock.py (`make lock`): edit pyproject.toml and constraints.txt instead.\n"
        (HERE / f"requirements{name}.txt").write_text(header + text, encoding="utf-8")


if __name__ == "__main__":
    main()
