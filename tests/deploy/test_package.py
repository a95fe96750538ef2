"""The wheel: one version for everything, and every file that the packages need at run time."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from email.parser import Parser
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from scalabl import __version__
from tests.deploy.manifests import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = {"scalabl_kernels": Path("kernels"), "scalabl": Path(), "scalabl_server": Path("server")}  # of each package


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built with this environment's setuptools, and from a copy, since that leaves files behind."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    parts = ["kernels", "scalabl", "server", "pyproject.toml", "README.md", "LICENSE"]
    subprocess.run(["cp", "-R", *(str(ROOT / part) for part in parts), str(source)], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--wheel-dir", str(folder), str(source)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return zipfile.ZipFile(built)


def test_it_holds_every_file_of_the_packages(wheel: zipfile.ZipFile) -> None:
    here = {
        str(path.relative_to(ROOT / folder))
        for package, folder in FOLDERS.items()
        for path in (ROOT / folder / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    there = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert here - there == set()
    assert there - here == set()
    assert {f"{package}/py.typed" for package in FOLDERS} <= there
    assert {name.partition("/")[0] for name in there} == set(FOLDERS)  # nothing else becomes importable


def test_its_name_says_the_version_of_the_code(wheel: zipfile.ZipFile) -> None:
    assert Path(str(wheel.filename)).name.startswith(f"scalabl-{__version__}-py3")
    metadata = Parser().parsestr(wheel.read(f"scalabl-{__version__}.dist-info/METADATA").decode())
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert f"scalabl-{__version__}.dist-info/licenses/LICENSE" in wheel.namelist()
    assert (
        "scalabl = scalabl_server.cli.main:app" in wheel.read(f"scalabl-{__version__}.dist-info/entry_points.txt").decode()
    )
    assert any(script.name == "scalabl" for script in entry_points(group="console_scripts"))


def test_extras_are_the_designs() -> None:
    assert {"train", "otel", "postgres", "dev"} <= set(PROJECT["project"]["optional-dependencies"])


def test_the_version_stands_in_one_place() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "scalabl.__version__"}
    assigned = re.compile(r"^\s*__?version__?\s*(?::\s*\w+\s*)?=", flags=re.MULTILINE)
    files = [path for package, folder in FOLDERS.items() for path in (ROOT / folder / package).rglob("*.py")]
    assert [path for path in files if assigned.search(path.read_text(encoding="utf-8"))] == [
        ROOT / "scalabl" / "__init__.py"
    ]


def test_the_changelog_begins_with_it() -> None:
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert headings[0] == __version__
    assert len(set(headings)) == len(headings)
