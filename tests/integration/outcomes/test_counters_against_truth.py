"""A real Prometheus with two real replicas: its ECE, accuracy and Brier score equal an offline computation."""

from __future__ import annotations

import contextlib
import math
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.support.offline_scores import offline_scores
from tests.integration.support.process import write_models
from tests.integration.support.prometheus import prometheus, query
from tests.integration.support.replicas import Postgres, Replica, postgres, running, wait_until

pytestmark = pytest.mark.integration

PREDICTIONS = 2000
PER_REQUEST = 100

# What is left of a sum after its corrections, over all replicas.
LEFT = "sum by ({by}) (scalabl_outcomes{what}_total - scalabl_outcomes{what}_retracted_total)"
LABELLED = LEFT.format(by="adapter", what="")
OUTSIDE = LEFT.format(by="adapter", what="_outside")
QUERIES = {
    "labelled": LABELLED,
    "accuracy": f"{LEFT.format(by='adapter', what='_correct')} / {LABELLED}",
    "ece": "sum by (adapter) (abs({correct} - {confidence})) / {labelled}".format(
        correct=LEFT.format(by="adapter, bin", what="_correct"),
        confidence=LEFT.format(by="adapter, bin", what="_confidence"),
        labelled=LABELLED,
    ),
    "brier": f"{LEFT.format(by='adapter', what='_brier')} / {LABELLED}",
    "log_loss": f"{LEFT.format(by='adapter', what='_log_loss_nats')} / ({LABELLED} - {OUTSIDE})",
    "predictions": "sum by (adapter) (scalabl_recorded_predictions_total)",
    "mean_confidence": "sum by (adapter) (scalabl_recorded_confidence_total)"
    " / sum by (adapter) (scalabl_recorded_predictions_total)",
}


def _query(client: httpx.Client, expression: str) -> dict[str, float]:
    """Adapter -> value; empty while there is no data."""
    return {series["metric"]["adapter"]: float(series["value"][1]) for series in query(client, expression)}


@pytest.fixture(scope="module")
def database() -> Iterator[Postgres]:
    with postgres() as database:
        yield database


def test_promql_tells_the_truth_over_two_replicas_and_a_restart(database: Postgres, tmp_path: Path) -> None:
    models = write_models(tmp_path)
    replicas = [Replica(models, name, database.url) for name in ("a", "b")]
    dice = random.Random(0)
    scrape = {"job_name": "scalabl", "static_configs": [{"targets": [replica.address for replica in replicas]}]}
    config = {"global": {"scrape_interval": "1s"}, "scrape_configs": [scrape]}
    with prometheus(tmp_path, config) as client, running(*replicas):
        answers: list[dict[str, Any]] = []
        labels: list[str | None] = []

        def serve(count: int) -> None:
            """Predictions from both replicas, each labelled at either, one in four corrected at either, some sent twice."""
            for request in range(0, count, PER_REQUEST):
                texts = ["".join(dice.choices("abcdefgh ?!", k=dice.randint(1, 30))) + "." for _ in range(PER_REQUEST)]
                predictions = replicas[request // PER_REQUEST % 2].predict(texts)
                first = [_label(prediction, dice) for prediction in predictions]
                ids = [prediction["id"] for prediction in predictions]
                given = list(zip(ids, first, strict=True))
                assert dice.choice(replicas).feedback(given).status_code == 200
                final = [
                    _label(prediction, dice) if dice.random() < 0.25 else label
                    for prediction, label in zip(predictions, first, strict=True)
                ]
                changed = [(name, after) for name, after, before in zip(ids, final, first, strict=True) if after != before]
                for _ in range(2):
                    assert dice.choice(replicas).feedback(changed).status_code == 200
                answers.extend(predictions)
                labels.extend(final)

        serve(PREDICTIONS // 2)
        half = offline_scores(answers, labels)
        _compare(client, half)  # before the restart as well: the counters that it must not lose
        replicas[0].kill()
        replicas[0].start()
        replicas[0].wait()
        serve(PREDICTIONS // 2)
        assert replicas[1].terminate() == 0
        replicas[1].start()
        replicas[1].wait()
        assert len(answers) == PREDICTIONS
        measured = _compare(client, offline_scores(answers, labels))
        corrections = _query(client, "sum by (adapter) (scalabl_outcomes_retracted_total)")["colours"]
        assert corrections > PREDICTIONS / 10
        print({name: f"{value:.12f}" for name, value in measured.items()}, f"{corrections:.0f} corrections")


def _label(answer: dict[str, Any], dice: random.Random) -> str | None:
    """The truth: often the prediction, so that every bin has both outcomes; sometimes none of the choices."""
    return answer["prediction"] if dice.random() < 0.5 else dice.choice([*answer["probabilities"], None])


def _compare(client: httpx.Client, expected: dict[str, float]) -> dict[str, float]:
    """Hold each number against the truth, once the scrapes hold everything: a correction changes no count of labels."""

    def measured() -> dict[str, float]:
        return {name: _query(client, query).get("colours", math.nan) for name, query in QUERIES.items()}

    with contextlib.suppress(AssertionError):  # what never comes true is told below
        wait_until(lambda: measured() == pytest.approx(expected, abs=1e-9), 30, 0.2)
    last = measured()
    for name, value in expected.items():
        assert last[name] == pytest.approx(value, abs=1e-9), name
    return last


def test_promtool_has_nothing_to_say(database: Postgres, tmp_path: Path) -> None:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is missing; apt-get install prometheus")
    replica = Replica(write_models(tmp_path), "checked", database.url)
    with running(replica):
        (answer,) = replica.predict("rose")
        replica.feedback([(answer["id"], "red")])
        text = replica.client.get("/metrics").content
    done = subprocess.run([program, "check", "metrics"], input=text, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, b"")
