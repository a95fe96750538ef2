"""The import contracts of pyproject.toml: they hold, and an import that breaks one is refused with its name."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = (
    "kernels/scalabl_kernels",
    "scalabl",
    "server/scalabl_server",
    "benchmarks",
    "deploy/grafana",
    "deploy/reference",
    "examples/intent_router",
)
PACKAGES = tuple(folder.removeprefix("kernels/").removeprefix("server/").replace("/", ".") for folder in FOLDERS)


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """What `make lint` runs, on the packages in this folder."""
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache", "--no-logo"]
    # Before the packages that are installed.
    variables = os.environ | {"PYTHONPATH": f"{folder / 'kernels'}:{folder / 'server'}", "COLUMNS": "200"}
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=60)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The project's modules and their contracts, to change."""
    for folder in FOLDERS:
        for source in (ROOT / folder).rglob("*.py"):
            target = tmp_path / source.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_every_contract_is_kept() -> None:
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize(
    ("contract", "file", "imported"),
    [
        ("Layers of packages", "kernels/scalabl_kernels/launch.py", "scalabl.errors"),
        ("Layers of packages", "scalabl/config.py", "scalabl_server.settings"),
        ("Layers of packages", "server/scalabl_server/settings.py", "benchmarks.machine"),
        ("Layers of scalabl_kernels", "kernels/scalabl_kernels/launch.py", "scalabl_kernels.tools.roofline"),
        ("Layers of scalabl", "scalabl/errors.py", "scalabl.config"),
        ("Layers of scalabl_server", "server/scalabl_server/problems.py", "scalabl_server.settings"),
        ("No cycles, at any depth", "benchmarks/machine.py", "benchmarks.load"),
        ("No cycles, at any depth", "deploy/grafana/panels.py", "deploy.grafana.build"),
        ("Only the HTTP side of the server knows HTTP", "scalabl/config.py", "starlette"),
        ("Only the HTTP side of the server knows HTTP", "server/scalabl_server/settings.py", "fastapi"),
        ("Only the vLLM engine sends requests to other servers", "server/scalabl_server/settings.py", "httpx2"),
        ("Only the server and its benchmarks know Prometheus", "scalabl/errors.py", "prometheus_client"),
        ("Nothing imports tests", "benchmarks/machine.py", "tests"),
    ],
)
def test_an_import_that_breaks_a_contract_is_named(copy: Path, contract: str, file: str, imported: str) -> None:
    with (copy / file).open("a", encoding="utf-8") as module:
        module.write(f"\nimport {imported}\n")
    done = lint_imports(copy)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{contract} BROKEN" in done.stdout
    importer = file.removeprefix("kernels/").removeprefix("server/").removesuffix(".py").replace("/", ".")
    if contract == "No cycles, at any depth":  # which names the modules by their place in the package
        assert f"No cycles are allowed in {importer.rpartition('.')[0]}" in done.stdout
    else:
        assert f"{importer} -> {imported} (l." in done.stdout


def test_a_module_that_is_in_no_layer_is_named(copy: Path) -> None:
    (copy / "scalabl" / "unplaced.py").touch()
    done = lint_imports(copy)
    assert done.returncode == 1
    assert "scalabl.unplaced" in done.stdout


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Module by module, so that a package's `__init__` and the modules inside it count as well."""
    graph = grimp.build_graph(PACKAGES[0], *PACKAGES[1:], "tests", cache_dir=None)
    imports = [
        (importer, imported)
        for importer in sorted(graph.modules)
        for imported in sorted(graph.find_modules_directly_imported_by(importer))
    ]
    assert len(imports) > 500
    assert [f"{a} -> {b}" for a, b in imports if graph.chain_exists(importer=b, imported=a)] == []
