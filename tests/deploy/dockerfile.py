"""Parses the Dockerfile as BuildKit does: its instructions, and what they put into the image."""

from __future__ import annotations

import json
import re
from typing import Any

from scalabl_server.settings import ServeSettings

from tests.deploy.manifests import ROOT

TEXT = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")


def instructions() -> list[tuple[str, str]]:
    """(name, rest) of each, lines joined and comments left out."""
    lines = "\n".join(line for line in TEXT.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", lines)
    pairs = [line.partition(" ") for line in joined.splitlines() if line.strip()]
    return [(name, rest.strip()) for name, _, rest in pairs]


def stages() -> list[list[tuple[str, str]]]:
    """Each stage's instructions; what stands before the first is left out."""
    stages: list[list[tuple[str, str]]] = []
    for name, rest in instructions():
        if name == "FROM":
            stages.append([])
        if stages:
            stages[-1].append((name, rest))
    return stages


def final(name: str) -> list[str]:
    """What the last stage says after an instruction."""
    return [rest for instruction, rest in stages()[-1] if instruction == name]


def arguments() -> dict[str, str]:
    """Every build argument with its default."""
    pairs = [rest.partition("=") for name, rest in instructions() if name == "ARG"]
    return {name: default for name, _, default in pairs}


def environment() -> dict[str, str]:
    """The image's variables."""
    return dict(re.findall(r"(\w+)=(\S+)", " ".join(final("ENV"))))


def health_check() -> tuple[list[str], dict[str, str]]:
    """The command of HEALTHCHECK and its options."""
    (line,) = final("HEALTHCHECK")
    options, _, command = line.partition(" CMD ")
    words: list[str] = json.loads(command)
    return words, dict(re.findall(r"--([a-z-]+)=(\S+)", options))


def words(name: str) -> Any:
    """An instruction in its JSON form."""
    (line,) = final(name)
    return json.loads(line)


def settings_in_container(variables: dict[str, str]) -> ServeSettings:
    """What a server reads from the image's variables and these; those that the cluster fills in have some value."""
    values = {
        name.removeprefix("SCALABL_").lower(): value
        for name, value in (environment() | variables).items()
        if name.startswith("SCALABL_")
    }
    filled_in = {"outcomes_url": "postgresql://user@host/name", "threads": "4"}
    values |= {name: filled_in.get(name, "filled-in") for name, value in values.items() if value.startswith("{'")}
    return ServeSettings(**values)  # type: ignore[arg-type]  # text, as the environment has it
