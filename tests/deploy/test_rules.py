"""The Prometheus rules: what promtool says of them, and that each alert has its test and its section in the runbook."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "deploy" / "prometheus"
RULES = sorted((PROMETHEUS / "rules").glob("*.yml"))
TESTS = sorted((PROMETHEUS / "tests").glob("*.yml"))
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")


def rules_of(path: Path) -> list[dict[str, Any]]:
    groups = yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


ALERTS = [rule for path in RULES for rule in rules_of(path) if "alert" in rule]
NAMES = sorted({rule["alert"] for rule in ALERTS})


def promtool(*arguments: str | Path) -> str:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is missing; apt-get install prometheus")
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


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
    found = [re.findall(r'(?:adapter|job|instance|level)="[^"]+"', each["series"]) for each in group["input_series"]]
    return len({tuple(labels) for labels in found})


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
        for name in re.findall(r"[a-z_]*:?scalabl_[a-z_]+(?::\w+)?", rule["expr"]):
            assert name in (recorded if ":" in name else names), rule["expr"]
    assert set(re.findall(r"`(scalabl_[a-z_]+)", RUNBOOK)) <= names
