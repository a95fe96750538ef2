"""Collects what is carried to a machine with a GPU: wheels of the packages it lacks, and the authors' checkpoint.

python -m benchmarks.gpu.collect [--folder build/gpu] [--checkpoint ../shared]

The machine has Linux on x86-64, Python 3.12, torch, Triton, transformers, peft, accelerate, safetensors, SciPy, pytest,
hypothesis and prometheus-client. Ends with an error if the folder is larger than 60 MiB, or if it and the files of the
repository together are larger than 64 MiB.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER_LIMIT, TREE_LIMIT = 60 * 2**20, 64 * 2**20
PYTHON = "3.12"
PLATFORMS = [f"manylinux{tag}_x86_64" for tag in ("_2_28", "_2_27", "_2_26", "_2_24", "_2_17", "2014", "_2_5", "1")]
# The server's dependencies beside torch, transformers and what these need; pip adds what they need in turn.
PACKAGES = (
    "alembic",
    "fastapi",
    "h11",
    "httpx",
    "httpx2",
    "prometheus-client",
    "pydantic",
    "pydantic-settings",
    "SQLAlchemy",
    "tqdm",
    "typer",
    "uvicorn",
)
CHECKPOINT = Path("fixtures") / "bayesadapt_qwen2_r8"


def main() -> None:
    """Collect and check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "gpu", help="ignored by git")
    parser.add_argument("--checkpoint", type=Path, default=ROOT.parent / "shared", help="the folder that has fixtures/")
    options = parser.parse_args()
    wheels = options.folder / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    wheels.mkdir(parents=True)
    collect_wheels(wheels)
    if (options.checkpoint / CHECKPOINT).is_dir():
        shutil.copytree(options.checkpoint / CHECKPOINT, options.folder / CHECKPOINT, dirs_exist_ok=True)
    else:
        print(f"{options.checkpoint / CHECKPOINT} is no folder; the run will leave the authors' checkpoint out")
    carried, tracked = size_of(options.folder.rglob("*")), size_of(files_of(ROOT))
    print(f"{options.folder}: {carried / 2**20:.1f} MiB; with the repository {(carried + tracked) / 2**20:.1f} MiB")
    if problem := too_large(carried, tracked):
        sys.exit(problem)


def collect_wheels(folder: Path) -> None:
    """Download wheels for the machine, in the versions that constraints.txt has."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--dest", str(folder)]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", PYTHON]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    subprocess.run([*command, "--constraint", str(ROOT / "constraints.txt"), *PACKAGES], check=True)


def files_of(root: Path) -> list[Path]:
    """The files that travel with a repository: tracked ones, and others that git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    return [root / name for name in names.split("\0") if name]


def size_of(files: Iterable[Path]) -> int:
    """Bytes of the files among these paths."""
    return sum(path.stat().st_size for path in files if path.is_file())


def too_large(carried: int, tracked: int) -> str | None:
    """What is wrong with these sizes in bytes, of the folder and of the repository; None if nothing is."""
    if carried > FOLDER_LIMIT:
        return f"the carried folder has {carried / 2**20:.1f} MiB, at most {FOLDER_LIMIT / 2**20:.0f} MiB may be carried"
    if carried + tracked > TREE_LIMIT:
        whole = (carried + tracked) / 2**20
        return f"the repository and the carried folder have {whole:.1f} MiB, at most {TREE_LIMIT / 2**20:.0f} MiB may travel"
    return None


if __name__ == "__main__":
    main()
