"""`docs/reference.md` is what `python -m deploy.reference` writes, and has every flag, error and metric once."""

from __future__ import annotations

import re

import pytest
from prometheus_client import Counter
from pydantic_core import PydanticUndefined
from scalabl_server.observe.metrics import Metrics
from scalabl_server.outcomes.scoring import FAMILIES, RETRACTED
from scalabl_server.settings import ServeSettings
from scalabl_server.web.errors import STATUSES

from deploy.reference import page
from deploy.reference.__main__ import PAGE as FILE

PAGE = FILE.read_text(encoding="utf-8")


def test_the_committed_page_is_what_the_command_writes() -> None:
    assert page.render() == PAGE, "run `python -m deploy.reference`"


def _shown(default: object) -> str:
    if default is PydanticUndefined:
        return "required"
    if default is None:
        return "*none*"
    return f"`{default}`" if default != "" else "*empty*"


@pytest.mark.parametrize("name", ServeSettings.model_fields)
def test_every_flag_has_one_row_with_its_default_and_its_help(name: str) -> None:
    flag, field = "--" + name.replace("_", "-"), ServeSettings.model_fields[name]
    ((default, text),) = re.findall(rf"^\| `{flag}` \| (.*?) \| (.*?) \|", PAGE, flags=re.MULTILINE)
    assert default == _shown(field.default)
    assert text == field.description


def test_no_flag_is_named_that_does_not_exist() -> None:
    flags = {name.replace("_", "-") for name in ServeSettings.model_fields}
    assert set(re.findall(r"`--([a-z][a-z-]*)[ `]", PAGE)) <= flags


@pytest.mark.parametrize("slug", STATUSES)
def test_every_error_has_one_row_with_its_status_and_title(slug: str) -> None:
    status, title = STATUSES[slug]
    assert re.findall(rf"^\| (\d+) \| `{slug}` \| (.*?) \|", PAGE, flags=re.MULTILINE) == [(str(status), title)]


def test_every_metric_has_a_row_and_no_other_is_named() -> None:
    families = list(Metrics().registry.collect())
    suffix = {"counter": "_total", "info": "_info"}
    names = {family.name + suffix.get(family.type, "") for family in families if family.name.startswith("scalabl_")}
    names |= {f"{family.metric}_total" for family in FAMILIES.values()}
    names |= {f"{family.metric}{RETRACTED}_total" for family in FAMILIES.values() if family.of_labels}
    assert set(re.findall(r"`(scalabl_[a-z0-9_]+)`", PAGE)) == names
    for name in names:
        assert len(re.findall(rf"^\|[^|]*`{name}`", PAGE, flags=re.MULTILINE)) == 1


def test_labels_are_read_from_a_metric_that_has_no_samples_yet() -> None:
    # prometheus_client has no public name for `_labelnames`; when it is renamed, this test says so.
    assert Counter("calls", "Calls.", ["server", "outcome"], registry=None)._labelnames == ("server", "outcome")
    assert "| `scalabl_engine_calls_total` | counter | `server`, `outcome` (ok, " in PAGE


def test_names_that_the_code_or_the_words_lack_are_refused() -> None:
    with pytest.raises(page.MismatchError, match=r"flags: missing: b; unknown: c; listed twice: a"):
        page._compare("flags", ["a", "a", "c"], ["a", "b"])
