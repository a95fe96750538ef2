"""The Prometheus rules pass promtool, and each alert has a test and a section in the runbook."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.rules import PROMETHEUS, RULES, RUNBOOK, promtool, rules_of

TESTS = sorted((PROMETHEUS / "tests").glob("*.yml"))
ALERTS = [rule for path in RULES for rule in rules_of(path) if "alert" in rule]
NAMES = sorted({rule["alert"] for rule in ALERTS})


def test_promtool_accepts_the_configuration_and_every_rule() -> None:
    assert f"{len(RULES)} rule files found" in promtool("check", "config", PROMETHEUS / "prometheus.yml")
    promtool("check", "rules", "--lint=all", "--lint-fatal", *RULES)


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_the_rules_unit_tests_pass(path: Path) -> None:
    promtool("test", "rules", path)


def test_every_rule_file_has_its_unit_test_which_takes_its_groups_in_order() -> None:
    assert [path.name for path in TESTS] == [path.name for path in RULES]
    for path, test in zip(RULES, TESTS, strict=True):
        groups = yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
        order = yaml.safe_load(test.read_text(encoding="utf-8"))["group_eval_order"]
        assert order == [group["name"] for group in groups]


@pytest.mark.parametrize("name", NAMES)
def test_every_alert_fires_in_one_unit_test_and_stays_silent_for_another_series_or_time(name: str) -> None:
    cases = [
        (group, case)
        for path in TESTS
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["tests"]
        for case in group.get("alert_rule_test", [])
        if case["alertname"] == name
    ]
    assert any(case["exp_alerts"] for _, case in cases)
    # Silent: nothing at some time, or fewer than the objects that the group's series are about.
    assert any(len(case["exp_alerts"]) < _objects(group) for group, case in cases)


def _objects(group: dict[str, Any]) -> int:
    labels = [re.findall(r'(?:adapter|job|instance|level)="[^"]+"', series["series"]) for series in group["input_series"]]
    return len({tuple(pairs) for pairs in labels})


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: f"{rule['alert']}-{rule['labels']['severity']}")
def test_every_alert_says_how_bad_it_is_and_where_its_section_is(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("page", "ticket", "info")
    assert set(rule["annotations"]) == {"summary", "description", "runbook"}
    assert rule["annotations"]["runbook"] == f"docs/runbook.md#{rule['alert'].lower()}"


def test_the_runbook_has_a_section_for_every_alert_and_no_other() -> None:
    headings = re.findall(r"^### (\w+)$", RUNBOOK, flags=re.MULTILINE)
    assert sorted(headings) == NAMES
    for section in re.split(r"^###? ", RUNBOOK, flags=re.MULTILINE)[1:]:
        heading, _, text = section.partition("\n")
        if heading in NAMES:
            assert "\n* " in text, f"{heading}: nothing to do"
    mentioned = set(re.findall(r"`(Scalabl\w+)`", RUNBOOK))
    assert mentioned <= set(NAMES)


def test_flags_that_the_runbook_names_exist() -> None:
    from scalabl_server.settings import ServeSettings

    flags = {name.replace("_", "-") for name in ServeSettings.model_fields}
    assert set(re.findall(r"`--([a-z-]+)", RUNBOOK)) <= flags


def test_metrics_in_rules_and_runbook_exist() -> None:
    from scalabl_server.observe.metrics import Metrics
    from scalabl_server.outcomes.scoring import FAMILIES, RETRACTED

    names = {"up"}
    for family in Metrics().registry.collect():
        kinds = {"counter": ("_total",), "info": ("_info",), "histogram": ("_bucket", "_sum", "_count")}
        names |= {family.name + suffix for suffix in kinds.get(family.type, ("",))}
    for counter in FAMILIES.values():
        names |= {f"{counter.metric}_total"} | ({f"{counter.metric}{RETRACTED}_total"} if counter.of_labels else set())
    recorded = {rule["record"] for path in RULES for rule in rules_of(path) if "record" in rule}
    for rule in (rule for path in RULES for rule in rules_of(path)):
        for name in re.findall(r"[a-z_]*:?scalabl_[a-z0-9_]+(?::\w+)?", rule["expr"]):
            assert name in (recorded if ":" in name else names), rule["expr"]
    assert set(re.findall(r"`(scalabl_[a-z0-9_]+)", RUNBOOK)) <= names
