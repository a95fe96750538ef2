"""The repository's own rules and dashboards over two real replicas in traffic, and a drill: an adapter that is far too sure.

Prometheus reads the committed files. Only times are shortened, as `shortened` says, and the targets are this test's.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml

from scalabl.config import Abstention, Calibration, CalibrationData, Fit
from scalabl.evaluation.encoded import EncodedSet
from scalabl.files.adapter_directory import read_config
from scalabl.prompt import Prompter
from tests import tiny
from tests.deploy.boards import PANELS, resolved
from tests.deploy.rules import PROMETHEUS, RULES, rules_of
from tests.integration.support.offline_scores import offline_scores
from tests.integration.support.prometheus import alertmanager, prometheus, query
from tests.integration.support.replicas import Replica, postgres, running, wait_until

pytestmark = pytest.mark.integration

PER_REQUEST = 50
SEVERAL_PASSES = ("--target-batch-tokens", "1024")  # of a request, on any machine, so that there is time between two passes
LABELS = 600  # of each adapter
KEY = "a-key-of-the-tests"
RECORDED = sorted({rule["record"] for path in RULES for rule in rules_of(path) if "record" in rule})
QUERIES = [(f"{name}: {panel['title']}", target["expr"]) for name, panel in PANELS for target in panel["targets"]]

# What `shortened` replaces. Windows stay as they are but for the reference, which otherwise begins a day ago.
TIMES = (
    (r"interval: \w+", "interval: 1s"),
    (r"for: \w+", "for: 2s"),
    (r"\[7d\] offset 1d", "[5m] offset 5s"),
)


def shortened(rules: str) -> str:
    """The rules, evaluated each second, whose alerts wait two seconds and whose reference is what came before just now."""
    for pattern, replacement in TIMES:
        rules = re.sub(pattern, replacement, rules)
    return rules


@dataclass
class Stack:
    """Two replicas, the Prometheus that scrapes them, their answers and the labels sent to them."""

    replicas: list[Replica]
    client: httpx.Client
    alerts_to: str | None
    dice: random.Random = field(default_factory=lambda: random.Random(0))
    answers: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {"colours": [], "sure": []})
    labels: dict[str, list[str]] = field(default_factory=lambda: {"colours": [], "sure": []})

    def serve(self) -> None:
        """The same inputs to both adapters, at either replica. Truth is drawn from what `colours` says: it is calibrated."""
        texts = [random_text(self.dice) for _ in range(PER_REQUEST)]
        truth: list[str] = []
        for adapter in ("colours", "sure"):
            answer = self._post("/predict", {"inputs": texts, "adapter": adapter})["predictions"]
            if adapter == "colours":
                truth = [
                    self.dice.choices(list(p), list(p.values()))[0]
                    for p in (prediction["probabilities"] for prediction in answer)
                ]
            ids = [prediction["id"] for prediction in answer]
            # One in ten gets a wrong label first.
            first = [self.dice.choice(list(tiny.CLASSIFICATION.choices)) if self.dice.random() < 0.1 else t for t in truth]
            for labels in (first, truth):
                self._post("/feedback", [{"id": name, "label": label} for name, label in zip(ids, labels, strict=True)])
            self.answers[adapter] += answer
            self.labels[adapter] += truth

    def _post(self, path: str, body: Any) -> Any:
        replica = self.dice.choice(self.replicas)
        response = replica.client.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def value(self, expression: str) -> float:
        """Of the one series that it gives; NaN without."""
        series = query(self.client, expression)
        return float(series[0]["value"][1]) if series else math.nan

    def firing(self) -> list[dict[str, str]]:
        alerts = self.client.get("/api/v1/alerts").json()["data"]["alerts"]
        return [alert["labels"] for alert in alerts if alert["state"] == "firing"]


def random_text(dice: random.Random, letters: str = "abcdefgh ?!", longest: int = 30) -> str:
    return "".join(dice.choices(letters, k=dice.randint(1, longest))) + "."


def add_novelty(adapter: Path, *kind: Any) -> None:
    """Give an adapter a novelty reference made from texts of a kind, with p-values from other such texts.

    Args:
        kind: letters and largest length, as of `random_text`.
    """
    task = read_config(adapter).task
    prompter, dice = Prompter(task, tiny.tokenizer()), random.Random(7)

    def prompts(count: int) -> EncodedSet:
        sequences = [prompter.encode(random_text(dice, *kind)) for _ in range(count)]
        return EncodedSet(sequences, torch.arange(count) % 3, torch.full((count,), 3))

    tiny.add_novelty(adapter, level=0.05, num_samples=4, prompts=(prompts(200), prompts(200)))


def _calibration() -> Calibration:
    """As if by `scalabl calibrate`: sets of two levels, and abstention where the confidence is below 0.45."""
    return Calibration(
        data=CalibrationData(name="made", sha256="0" * 64, rows=100, fit_rows=50, threshold_rows=50),
        num_samples=4,
        seed=0,
        draw_scheme="sobol",
        method="lac",
        thresholds={"lac": {"0.8": 0.7, "0.9": 0.85}, "aps": {"0.8": 0.9, "0.9": 0.97}},
        abstain=Abstention(
            score="confidence",
            threshold=0.55,
            target_risk=0.5,
            confidence=0.9,
            achieved_risk=0.4,
            risk_bound=0.5,
            coverage=0.8,
        ),
        quantiles={"mutual_information": {"0.5": 0.1}, "entropy": {"0.5": 0.8}},
        before=Fit(nll=1, ece=0.1),
        after=Fit(nll=1, ece=0.1),
    )


def _config(folder: Path, replicas: list[Replica], alerts_to: str | None) -> dict[str, Any]:
    """The repository's prometheus.yml with this test's targets, rules and times."""
    config: dict[str, Any] = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8"))
    assert config["rule_files"] == ["rules/*.yml"]
    (folder / "rules").mkdir()
    texts = {path.name: path.read_text(encoding="utf-8") for path in RULES}
    for pattern, _ in TIMES:
        assert any(re.search(pattern, text) for text in texts.values()), pattern
    for name, text in texts.items():
        (folder / "rules" / name).write_text(shortened(text), encoding="utf-8")
    (scrape,) = config["scrape_configs"]
    scrape["static_configs"] = [{"targets": [replica.address for replica in replicas]}]
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    if alerts_to is not None:
        config["alerting"] = {"alertmanagers": [{"static_configs": [{"targets": [alerts_to]}]}]}
    return config


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("monitoring")
    tiny.write_base(folder / "base")
    tiny.write_adapter(folder / "colours", calibration=_calibration())
    tiny.write_adapter(folder / "sure", calibration=_calibration(), temperature=0.05)
    add_novelty(folder / "colours")
    add_novelty(folder / "sure", "X", 3)  # so that the inputs are strange to it
    with ExitStack() as exits:
        database = exits.enter_context(postgres())
        alerts_to = None
        with suppress(pytest.skip.Exception):  # told by the one test that needs it
            alerts_to = exits.enter_context(alertmanager(folder))
        more = ("--adapters", f"sure={folder / 'sure'}", "--api-keys", f"tests:{KEY}")
        replicas = [Replica(folder, name, database.url, *more, *SEVERAL_PASSES) for name in ("a", "b")]
        client = exits.enter_context(prometheus(folder, _config(folder, replicas, alerts_to)))
        exits.enter_context(running(*replicas))
        for replica in replicas:
            replica.client.headers["authorization"] = f"Bearer {KEY}"
        stack = Stack(replicas, client, alerts_to)
        # Its zeros first: what a counter has before it is seen is no increase.
        wait_until(lambda: stack.value("count(scalabl_outcomes_total)") == 2 * 2 * 15, 60, 0.2)
        for _ in range(LABELS // PER_REQUEST):
            stack.serve()
        yield stack


def test_the_recorded_numbers_are_those_of_an_offline_computation(stack: Stack) -> None:
    """But for what `increase` extrapolates, from the last scrape to now, which matters less the longer the run is."""
    names = {
        "outcomes": "labelled", "recorded_predictions": "predictions", "ece": "ece", "accuracy": "accuracy",
        "confidence": "mean_confidence", "brier": "brier", "log_loss_nats": "log_loss",
    }  # fmt: skip

    def recorded_of(adapter: str) -> dict[str, float]:
        return {name: stack.value(f'adapter:scalabl_{name}:recent{{adapter="{adapter}"}}') for name in names}

    for adapter in ("colours", "sure"):
        truth = offline_scores(stack.answers[adapter], stack.labels[adapter])
        expected = {name: pytest.approx(truth[other], rel=0.03, abs=0.003) for name, other in names.items()}
        left = " - ".join(f'sum(scalabl_outcomes{what}_total{{adapter="{adapter}"}})' for what in ("", "_retracted"))
        wait_until(lambda: stack.value(left) == truth["labelled"], 30, 0.2)  # noqa: B023  (called at once)
        with suppress(AssertionError):  # told below, by name
            wait_until(lambda: recorded_of(adapter) == expected, 120, 0.5)  # noqa: B023
        recorded = recorded_of(adapter)
        print(adapter, {name: f"{value:.4f}, true {truth[names[name]]:.4f}" for name, value in recorded.items()})
        for name, value in recorded.items():
            assert value == expected[name], name
    floor, deviation = (
        stack.value(f'adapter:scalabl_ece_{name}:recent{{adapter="colours"}}') for name in ("floor", "deviation")
    )
    assert abs(recorded_of("colours")["ece"] - floor) < 4 * deviation
    assert recorded_of("sure")["ece"] > 0.1


def test_every_recording_rule_returns_data(stack: Stack) -> None:
    _all_return_data(stack, [(name, name) for name in RECORDED])


def test_every_query_of_every_panel_returns_data(stack: Stack) -> None:
    _all_return_data(stack, [(name, resolved(expr, "30s")) for name, expr in QUERIES])


def _all_return_data(stack: Stack, queries: list[tuple[str, str]]) -> None:
    """Under traffic, since some tell of the last half minute only."""
    missing = list(queries)

    def complete() -> bool:
        stack.serve()
        missing[:] = [pair for pair in missing if not _has_data(stack.client, pair[1])]
        return not missing

    with suppress(AssertionError):  # told below, by name
        wait_until(complete, 60, 0.5)
    assert not missing
    print(f"{len(queries)} queries, each with data")


def _has_data(client: httpx.Client, expression: str) -> bool:
    return any(math.isfinite(float(series["value"][1])) for series in query(client, expression))


def test_the_adapter_that_is_too_sure_is_accused_and_the_calibrated_one_is_not(stack: Stack) -> None:
    drift = {"alertname": "ScalablCalibrationDrift", "severity": "ticket", "job": "scalabl", "adapter": "sure"}
    wait_until(lambda: drift in stack.firing(), 60, 0.2)
    changed = drift | {"alertname": "ScalablTrafficChanged"}
    wait_until(lambda: changed in stack.firing(), 60, 0.2)
    firing = stack.firing()
    print(sorted((alert["alertname"], alert.get("adapter", "")) for alert in firing))
    assert not [alert for alert in firing if alert.get("adapter") == "colours"]
    assert not [alert for alert in firing if alert["severity"] == "page"]


def test_the_alert_reaches_alertmanager_with_its_runbook(stack: Stack) -> None:
    if stack.alerts_to is None:
        pytest.skip("prometheus-alertmanager is missing; apt-get install prometheus-alertmanager")

    def arrived() -> list[dict[str, Any]]:
        alerts = httpx.get(f"http://{stack.alerts_to}/api/v2/alerts", timeout=10).json()
        return [alert for alert in alerts if alert["labels"]["alertname"] == "ScalablCalibrationDrift"]

    wait_until(lambda: bool(arrived()), 60, 0.2)
    (alert,) = arrived()
    assert alert["labels"]["adapter"] == "sure"
    assert alert["annotations"]["runbook"] == "docs/runbook.md#scalablcalibrationdrift"
    assert "(ECE) of the last day's labels is 0." in alert["annotations"]["description"]


def test_a_replica_that_dies_is_reported(stack: Stack) -> None:
    stack.replicas[1].kill()
    down = {"alertname": "ScalablReplicaDown", "severity": "ticket", "job": "scalabl", "instance": stack.replicas[1].address}
    wait_until(lambda: down in stack.firing(), 60, 0.2)
