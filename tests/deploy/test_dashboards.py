"""The Grafana dashboards: the committed files match the code, panels are complete, and queries use existing metrics."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.boards import BOARDS, GRAFANA, PANELS, resolved
from tests.deploy.rules import RULES, RUNBOOK, promtool, rules_of

DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}

each_panel = pytest.mark.parametrize(("name", "panel"), PANELS, ids=[f"{name}: {panel['title']}" for name, panel in PANELS])


def test_the_committed_files_are_what_the_code_builds() -> None:
    pytest.importorskip("grafana_foundation_sdk", reason="grafana-foundation-sdk is missing; pip install '.[dashboards]'")
    from deploy.grafana.build import rendered

    texts = rendered()
    assert set(texts) == {f"{name}.json" for name in BOARDS} == {"calibration.json", "service.json"}
    for name, text in texts.items():
        assert (GRAFANA / "dashboards" / name).read_text(encoding="utf-8") == text, "run python -m deploy.grafana.build"


@each_panel
def test_a_panel_has_a_title_a_text_a_unit_the_datasource_variable_and_letters(name: str, panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert len(panel["description"]) > 10
    assert panel["fieldConfig"]["defaults"]["unit"]
    targets = panel["targets"]
    assert [target["refId"] for target in targets] == list("ABCDEFGH"[: len(targets)])
    for where in (panel, *targets):
        assert where["datasource"] == DATASOURCE


def test_every_query_is_promql(tmp_path: Path) -> None:
    targets = [target for _, panel in PANELS for target in panel["targets"]]
    rules = [{"record": f"query:{number}", "expr": resolved(target["expr"])} for number, target in enumerate(targets)]
    file = tmp_path / "queries.yml"
    file.write_text(json.dumps({"groups": [{"name": "queries", "rules": rules}]}), encoding="utf-8")
    assert f"SUCCESS: {len(targets)} rules found" in promtool("check", "rules", file)


@each_panel
def test_a_query_is_restricted_by_the_variables_of_its_dashboard(name: str, panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        selectors = re.findall(r"scalabl\w*(?::\w+)?(\{.*?\})", target["expr"])
        selectors += re.findall(r"process_\w+(\{.*?\})", target["expr"])
        assert selectors
        for selector in selectors:
            assert 'namespace=~"$namespace", job=~"$job"' in selector
            if name == "calibration":
                assert 'adapter="$adapter"' in selector
        # One replica has no share of what is recorded for all of a job.
        if name == "service" and "job:" not in target["expr"]:
            assert 'instance=~"$replica"' in target["expr"]


@each_panel
def test_a_query_asks_for_metrics_and_recorded_series_that_exist(name: str, panel: dict[str, Any]) -> None:
    from scalabl_server.observe.metrics import Metrics
    from scalabl_server.outcomes.scoring import FAMILIES, RETRACTED

    known = {rule["record"] for path in RULES for rule in rules_of(path) if "record" in rule}
    for family in Metrics().registry.collect():
        kinds = {"counter": ("_total",), "info": ("_info",), "histogram": ("_bucket", "_sum", "_count")}
        known |= {family.name + suffix for suffix in kinds.get(family.type, ("",))}
    for counter in FAMILIES.values():
        known |= {f"{counter.metric}_total", f"{counter.metric}{RETRACTED}_total"}
    known |= {"process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds"}
    for target in panel["targets"]:
        assert set(re.findall(r"([a-z_:]*(?:scalabl|process)_[\w:]+)\{", target["expr"])) <= known


@each_panel
def test_what_is_joined_renamed_or_drawn_apart_is_there(name: str, panel: dict[str, Any]) -> None:
    legends = {target["legendFormat"] for target in panel["targets"]}
    for step in panel.get("transformations", []):
        if step["id"] == "organize":
            letters = {f"Value #{target['refId']}" for target in panel["targets"]}
            assert set(step["options"]["renameByName"]) == letters
            assert set(step["options"]["renameByName"].values()) == legends
        if step["id"] == "sortBy":
            assert {column["field"] for column in step["options"]["sort"]} <= legends
    for override in panel["fieldConfig"]["overrides"]:
        if override["matcher"]["id"] == "byName":
            assert override["matcher"]["options"] in legends
        for item in override["properties"]:
            assert item["id"] != "custom.fillBelowTo" or item["value"] in legends
    assert panel.get("options", {}).get("xField", next(iter(legends))) in legends


@pytest.mark.parametrize("name", BOARDS)
def test_variables_are_asked_of_the_chosen_data_source_and_no_two_panels_overlap(name: str) -> None:
    board = BOARDS[name]
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert list(variables) == ["datasource", "namespace", "job", {"calibration": "adapter", "service": "replica"}[name]]
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    for variable in list(variables.values())[1:]:
        assert variable["datasource"] == DATASOURCE
        assert variable["query"]["refId"]
        assert re.fullmatch(r"label_values\(scalabl_\w+(\{.*\})?, \w+\)", variable["query"]["query"])
    cells: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        own = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not own & cells, panel["title"]
        assert at["x"] + at["w"] <= 24
        cells |= own
    assert [panel["id"] for panel in board["panels"]] == list(range(1, len(board["panels"]) + 1))
    assert len({board["uid"] for board in BOARDS.values()}) == len(BOARDS)


def test_panels_and_dashboards_that_the_runbook_names_exist() -> None:
    titles = {panel["title"] for _, panel in PANELS} | {board["title"] for board in BOARDS.values()}
    named = set(re.findall(r"(?<!\*)\*([A-Z][^*\n]+)\*(?!\*)", RUNBOOK))
    assert named >= {"Calibration by confidence", "Label delay", "Requests by status", "ScalaBL: service"}
    assert named <= titles


def test_provisioning_names_the_prometheus_beside_it_and_the_folder_of_the_dashboards() -> None:
    def read(name: str) -> Any:
        return yaml.safe_load((GRAFANA / "provisioning" / name).read_text(encoding="utf-8"))

    (source,) = read("datasources/prometheus.yaml")["datasources"]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    scrapes = yaml.safe_load((GRAFANA.parent / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))
    assert source["jsonData"]["timeInterval"] == scrapes["global"]["scrape_interval"]
    (provider,) = read("dashboards/scalabl.yaml")["providers"]
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"
    assert provider["allowUiUpdates"] is False
