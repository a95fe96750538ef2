"""The boundary of the engines: which modules may import transformers, the model or vLLM. Checked in the source code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SERVER = Path(__file__).parents[3] / "server" / "scalabl_server"
ENGINES = {"transformers_engine", "vllm"}  # each one's own modules know how logits come about
INTERNALS = (
    "httpx2",
    "transformers",
    "scalabl.model.attachment",
    "scalabl.model.layer",
    "scalabl.model.scalabl_model",
    "scalabl.base.pretrained",
    "scalabl.files.sample_loras",
    "scalabl.model.trunk",
    *(f"scalabl_server.engines.{name}" for name in sorted(ENGINES)),
)
# The commands that work on an adapter without a server have the model to themselves.
FREE = (SERVER / "cli", SERVER / "engines" / "vllm", SERVER / "engines" / "transformers_engine.py")
MODULES = sorted(path for path in SERVER.rglob("*.py") if not any(path.is_relative_to(free) for free in FREE))


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, at the top or in a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield from (f"{node.module}.{each.name}" for each in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(SERVER)))
def test_the_server_knows_no_engine_from_inside(path: Path) -> None:
    found = [name for name in imports(path) if any(within(name, internal) for internal in INTERNALS)]
    if path == SERVER / "engines" / "load.py":  # which chooses one
        assert {name.split(".")[2] for name in found} == ENGINES
        return
    assert not found, f"{path.name} imports {found[0]}: only the engine's own module may"


def test_the_interface_fits_on_a_screen() -> None:
    tree = ast.parse((SERVER / "engines" / "interface.py").read_text(encoding="utf-8"))
    (engine,) = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Engine"]
    assert engine.end_lineno is not None
    assert engine.end_lineno - engine.lineno < 66
