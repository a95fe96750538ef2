"""Loads the Prometheus rules and the runbook for the tests, and runs promtool. The checks are in `test_rules`."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.manifests import ROOT

PROMETHEUS = ROOT / "deploy" / "prometheus"
RULES = sorted((PROMETHEUS / "rules").glob("*.yml"))
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")


def rules_of(path: Path) -> list[dict[str, Any]]:
    """The rules of a file, recording and alerting ones."""
    groups = yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def promtool(*arguments: str | Path) -> str:
    """What promtool prints; fails if it finds fault, skips where there is none."""
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is missing; apt-get install prometheus")
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
