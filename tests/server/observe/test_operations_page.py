"""`docs/operations.md` says every flag with its default, every error with its status and every metric."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic_core import PydanticUndefined
from scalabl_server.observe.metrics import Metrics
from scalabl_server.outcomes.scoring import FAMILIES, RETRACTED
from scalabl_server.problems import Kind
from scalabl_server.settings import ServeSettings
from scalabl_server.web.errors import STATUSES

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "operations.md").read_text(encoding="utf-8")


def _shown(default: object) -> str:
    if default is PydanticUndefined:
        return "required"
    if default is None:
        return "*none*"
    return f"`{default}`" if default != "" else "*empty*"


@pytest.mark.parametrize("name", ServeSettings.model_fields)
def test_every_flag_stands_there_with_its_default(name: str) -> None:
    flag = "--" + name.replace("_", "-")
    rows = re.findall(rf"^\| `{flag}` \| (.*?) \|", PAGE, flags=re.MULTILINE)
    assert rows == [_shown(ServeSettings.model_fields[name].default)]


def test_no_flag_stands_there_that_is_not_one() -> None:
    flags = {name.replace("_", "-") for name in ServeSettings.model_fields}
    assert set(re.findall(r"`--([a-z-]+)", PAGE)) <= flags


@pytest.mark.parametrize("kind", STATUSES)
def test_every_error_stands_there_with_its_status(kind: Kind) -> None:
    assert re.findall(rf"^\| (\d+) \| `{kind}` \|", PAGE, flags=re.MULTILINE) == [str(STATUSES[kind][0])]


def test_every_metric_stands_there_and_no_other() -> None:
    families = list(Metrics().registry.collect())
    suffix = {"counter": "_total", "info": "_info"}
    names = {family.name + suffix.get(family.type, "") for family in families if family.name.startswith("scalabl_")}
    names |= {family.metric.removesuffix("_total") + "_total" for family in FAMILIES.values()}
    shown = set(re.findall(r"\bscalabl_[a-z_]*[a-z]\b", PAGE))
    retracted = {name for name in shown if name.endswith(f"{RETRACTED}_total")}
    assert shown - retracted == names
    assert all(name.replace(RETRACTED, "") in names for name in retracted)
