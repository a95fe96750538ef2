"""kill -9 during a storm of feedback, twenty times: no acknowledged label is lost, none is counted twice."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.support.process import write_models
from tests.integration.support.replicas import Replica, postgres, running, wait_until

pytestmark = pytest.mark.integration

KILLS = 20
CLIENTS = 4
PREDICTIONS = 600
LABELS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("storm"))


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'outcomes.db'}"
        return
    with postgres() as server:
        yield server.url


class Client(threading.Thread):
    """Labels and corrects predictions that are its own; after a failure it sends the same again, to either replica."""

    def __init__(self, number: int, ids: list[str], addresses: list[str]) -> None:
        super().__init__()
        self._random = random.Random(number)
        self._ids, self._addresses = ids, addresses
        self.history: dict[str, list[str]] = {}  # as acknowledged, in order
        self.acknowledged = self.failures = 0
        self.stopping = threading.Event()
        self.unexpected: list[str] = []

    def run(self) -> None:
        with httpx.Client(timeout=10) as client:
            while not self.stopping.is_set():
                chosen = self._random.sample(self._ids, self._random.choice([1, 1, 1, 4]))
                self._until_acknowledged(client, [(name, self._random.choice(LABELS)) for name in chosen])

    def _until_acknowledged(self, client: httpx.Client, labels: list[tuple[str, str]]) -> None:
        body = [{"id": name, "label": label} for name, label in labels]
        while True:
            try:
                response = client.post(f"http://{self._random.choice(self._addresses)}/feedback", json=body)
            except httpx.TransportError:
                self.failures += 1
                self.stopping.wait(0.02)  # a client's back-off, which leaves the machine to the restart
                continue
            if response.status_code == 200:
                break
            self.failures += 1
            if response.status_code != 503:
                self.unexpected.append(response.text)
                return
        self.acknowledged += 1
        for name, label in labels:
            history = self.history.setdefault(name, [])
            if not history or history[-1] != label:
                history.append(label)


def test_no_acknowledged_label_is_lost_or_counted_twice(models: Path, url: str) -> None:
    replicas = [Replica(models, name, url) for name in ("a", "b")]
    with running(*replicas):
        texts = [f"text number {n}" for n in range(PREDICTIONS)]
        answers: dict[str, dict[str, Any]] = {}
        for start in range(0, PREDICTIONS, 100):
            for answer in replicas[start // 100 % 2].predict(texts[start : start + 100]):
                answers[answer["id"]] = answer
        ids = list(answers)
        clients = [Client(n, ids[n::CLIENTS], [replica.address for replica in replicas]) for n in range(CLIENTS)]
        for client in clients:
            client.start()
        try:
            for kill in range(KILLS):
                victim = replicas[kill % 2]
                reached = sum(client.acknowledged for client in clients) + 20
                wait_until(lambda reached=reached: sum(client.acknowledged for client in clients) >= reached)  # type: ignore[misc]
                victim.kill()
                victim.start()
                victim.wait("/metrics")
        finally:
            for client in clients:
                client.stopping.set()
            for client in clients:
                client.join(60)
        assert not [said for client in clients for said in client.unexpected]
        acknowledged, failures = (sum(getattr(client, name) for client in clients) for name in ("acknowledged", "failures"))
        for replica in replicas:
            replica.wait()  # its totals are on /metrics then
        histories = {name: history for client in clients for name, history in client.history.items()}
        print(f"{url.split(':')[0]}: {KILLS} kills, {acknowledged} requests acknowledged, {failures} failed")
        assert failures >= KILLS / 2, "the storm never noticed the kills"
        for name, history in histories.items():
            stored = replicas[0].client.get(f"/predictions/{name}").json()
            assert [entry["label"] for entry in stored["labels"]] == history, name
            assert stored["label"] == history[-1]

        summed = [replica.totals() for replica in replicas]

        def total(metric: str) -> float:
            return sum(counters[f"scalabl_{metric}_total"] for counters in summed)

        assert total("recorded_predictions") == PREDICTIONS
        assert total("outcomes") == sum(map(len, histories.values()))
        assert total("outcomes") - total("outcomes_retracted") == len(histories)
        correct = sum(answers[name]["prediction"] == history[-1] for name, history in histories.items())
        assert total("outcomes_correct") - total("outcomes_correct_retracted") == correct
        brier = sum(
            (p - (choice == history[-1])) ** 2
            for name, history in histories.items()
            for choice, p in answers[name]["probabilities"].items()
        )
        assert total("outcomes_brier") - total("outcomes_brier_retracted") == pytest.approx(brier, rel=1e-9)
