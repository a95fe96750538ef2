"""The hand-written pages: links lead somewhere; flags, metrics, log messages, files and commands that they name exist."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest
from scalabl_server.observe.metrics import Metrics
from scalabl_server.outcomes.scoring import FAMILIES, RETRACTED
from scalabl_server.settings import ServeSettings

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("README.md")])
TEXTS = {path: path.read_text(encoding="utf-8") for path in PAGES}
ARCHITECTURE = TEXTS[ROOT / "docs" / "architecture.md"]
SERVER = ROOT / "server" / "scalabl_server"
RUNNING = TEXTS[ROOT / "docs" / "running.md"]


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _prose(text: str) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def _anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", _prose(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", _prose(TEXTS[page])):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), target
        if anchor:
            assert anchor in _anchors(TEXTS[path]), target


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_files_and_modules_in_code_quotes_exist(page: Path) -> None:
    """Paths from the root of the repository, such as `scalabl/passes` or `tests/deploy/test_noise.py`."""
    roots = "kernels|scalabl|server|tests|benchmarks|examples|docker|deploy|docs"
    for path in re.findall(rf"`((?:{roots})/[\w./-]+)`", _prose(TEXTS[page])):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_make_targets_and_python_commands_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([a-z-]+)", TEXTS[page]):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target
    folders = [ROOT, ROOT / "kernels", ROOT / "server"]
    for module in re.findall(r"python -m ((?:benchmarks|deploy|examples|kernels|scalabl\w*)[\w.]*\w)", TEXTS[page]):
        relative = module.replace(".", "/")
        assert any((folder / f"{relative}{end}").is_file() for folder in folders for end in (".py", "/__main__.py")), module


MODULES = sorted(
    path
    for folder in ("kernels/scalabl_kernels", "scalabl", "server/scalabl_server")
    for path in (ROOT / folder).rglob("*.py")
    if path.name != "__init__.py"
)


def test_every_module_that_the_architecture_page_names_exists() -> None:
    paths = [path.as_posix() for path in MODULES]
    for name in set(re.findall(r"[\w/]+\.py", ARCHITECTURE)):
        assert any(path.endswith(f"/{name}") for path in paths), name


def test_the_map_has_every_module_of_kernels_and_core_and_every_part_of_the_server() -> None:
    for path in MODULES:
        if path.is_relative_to(SERVER) and path.parent != SERVER:
            assert f"`{path.relative_to(SERVER).parts[0]}`" in ARCHITECTURE, path
        else:
            assert f"`{path.name}`" in ARCHITECTURE, path


@pytest.mark.parametrize(("column", "package"), [(0, "scalabl_kernels"), (1, "scalabl"), (2, "scalabl_server")])
def test_the_layers_are_those_that_import_linter_checks(column: int, package: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    (layers,) = [contract["layers"] for contract in contracts if contract.get("containers") == [package]]
    section = ARCHITECTURE.partition("## What may import what\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("|")][2:]
    cells = [set(re.findall(r"`(\w+)`", row[column])) for row in rows]
    assert [cell for cell in cells if cell] == [set(re.findall(r"\w+", layer)) for layer in layers]


def test_running_names_flags_and_metrics_that_exist() -> None:
    flags = {name.replace("_", "-") for name in ServeSettings.model_fields}
    text = RUNNING.replace("--no-dashboard", "--dashboard")
    assert set(re.findall(r"--([a-z][a-z-]*)", text)) <= flags
    names = {f"{family.name}_total" if family.type == "counter" else family.name for family in Metrics().registry.collect()}
    for family in FAMILIES.values():
        names |= {f"{family.metric}_total"} | ({f"{family.metric}{RETRACTED}_total"} if family.of_labels else set())
    assert set(re.findall(r"\bscalabl_[a-z_]*[a-z]\b", text)) - {"scalabl_server"} <= names


def _messages() -> set[str]:
    """Every string in the code of the server and the core, with `…` for what is filled in."""
    found = set()
    for folder in (ROOT / "server" / "scalabl_server", ROOT / "scalabl"):
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "…" for part in node.values]
                    found.add("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(re.sub(r"%\.?\d*[sdrgf]", "…", node.value))
    return found


def test_log_messages_are_those_of_the_code() -> None:
    section = RUNNING.partition("## Log messages that ask for something\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?`) \|", section, flags=re.MULTILINE)
    messages = _messages()
    shown = [message for row in rows for message in re.findall(r"`(.*?)`", row)]
    assert len(shown) >= 9
    for message in shown:
        pattern = re.escape(message).replace("…", ".*")
        assert any(re.search(pattern, known) for known in messages), message


def test_the_readme_is_short() -> None:
    lines = TEXTS[ROOT / "README.md"].splitlines()
    assert len(lines) <= 200
    assert [line for line in lines if len(line) > 125] == []
