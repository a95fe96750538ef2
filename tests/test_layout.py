"""How the repository is laid out: sizes of files and folders, what packages say of themselves, and which way imports go.

The order of layers within the three packages is import-linter's (`make lint`).
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("kernels", "scalabl", "server", "benchmarks", "deploy", "examples", "docker", "tests")
PACKAGES = ("kernels", "scalabl", "server", "benchmarks")  # whose packages say what they are for
SEARCH_PATH = ("kernels", "server", ".")  # as in pyproject.toml; a folder below another comes first
LINES, LINES_OF_TESTS, MODULES = 400, 500, 14
# A released version of the database stays a module of its own for ever, so their number only grows.
UNLIMITED = ("server/scalabl_server/outcomes/migrations/versions",)

FILES = [path.relative_to(ROOT) for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
INITS = [file for file in FILES if file.name == "__init__.py" and file.parts[0] in PACKAGES]


def docstring(file: Path) -> str:
    return ast.get_docstring(ast.parse((ROOT / file).read_text(encoding="utf-8"))) or ""


def test_no_file_is_longer_than_one_can_read() -> None:
    lengths = {file: len((ROOT / file).read_text(encoding="utf-8").splitlines()) for file in FILES}
    assert len(lengths) > 100
    limits = {file: LINES_OF_TESTS if file.parts[0] == "tests" else LINES for file in FILES}
    assert {str(file): length for file, length in lengths.items() if length > limits[file]} == {}


def test_no_folder_has_more_modules_than_one_can_survey() -> None:
    counts = Counter(str(file.parent) for file in FILES)
    assert {folder: count for folder, count in counts.items() if count > MODULES and folder not in UNLIMITED} == {}


def test_no_module_is_named_for_anything_and_nothing() -> None:
    assert [str(file) for file in FILES if file.stem in ("utils", "helpers", "common")] == []


@pytest.mark.parametrize(
    "file", [file for file in FILES if file.name == "__init__.py" and file.parts[0] in PACKAGES], ids=str
)
def test_every_package_says_in_a_sentence_what_lives_there(file: Path) -> None:
    first = docstring(file).partition("\n")[0]
    assert first[:1].isupper(), first
    assert first.endswith("."), first
    assert len(first.split()) >= 4, first


def module_name(file: Path) -> str:
    folder = next(folder for folder in SEARCH_PATH if file.is_relative_to(folder))
    parts = file.relative_to(folder).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES_BY_NAME = {module_name(file): file for file in FILES}


def imports_of(file: Path) -> Iterator[str]:
    """The modules of this repository that a file names in an import, wherever in the file that stands."""
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES_BY_NAME else str(node.module) for name in submodules]
        else:
            continue
        yield from (name for name in names if name in MODULES_BY_NAME)


IMPORTS = {name: set(imports_of(file)) - {name} for name, file in MODULES_BY_NAME.items()}


def test_tests_are_imported_by_tests_alone() -> None:
    users = {name for name, imported in IMPORTS.items() if any(other.partition(".")[0] == "tests" for other in imported)}
    assert len(users) > 10
    assert {name for name in users if name.partition(".")[0] != "tests"} == set()


def test_benchmarks_are_imported_by_tests_alone() -> None:
    users = {name for name, imported in IMPORTS.items() if any(other.startswith("benchmarks") for other in imported)}
    assert {name.partition(".")[0] for name in users} == {"benchmarks", "tests"}


def test_no_modules_import_one_another() -> None:
    TopologicalSorter(IMPORTS).prepare()  # raises CycleError, which names the modules
