"""Requests for different adapters share passes, and each gets the answer that it gets alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from scalabl_server.engines import transformers_engine
from scalabl_server.engines.load import load_engine

from scalabl.model.forward_pass import Reading
from scalabl.model.posterior import Draws
from scalabl.model.token_batch import TokenBatch
from scalabl.passes.side_by_side import SideBySide
from tests import tiny
from tests.server.conftest import Gate, settings_for, wait_until
from tests.server.web.test_limits import lifetime_of

CHOICES = ["one", "two", "three"]
BODIES: list[dict[str, Any]] = [
    {"inputs": "the grass after rain"},
    {"inputs": "why", "adapter": "letters", "choices": CHOICES},
    {"inputs": ["rose", "b" * 50], "adapter": "mixture", "num_samples": 7},
    {"inputs": "sky blue", "num_samples": "auto"},
    {"inputs": "how", "adapter": "letters", "choices": CHOICES[:2], "num_samples": "auto"},
    {"inputs": "zz top", "adapter": "mixture", "method": "linearized"},
    {"inputs": "a", "adapter": "mixture", "num_samples": "auto", "target": "probabilities"},
    {"inputs": "a", "method": "control_variate"},
    {"inputs": "a", "adapter": "scaled", "seed": 3},
]


@pytest.fixture(scope="module")
def others(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Names and folders of further adapters: of another task, a mixture, and one of another scaling."""
    folder = tmp_path_factory.mktemp("others")
    tiny.write_adapter(folder / "mixture", **tiny.MIXTURE, temperature=1.7)
    tiny.write_adapter(folder / "scaled", lora_alpha=2.0)
    return f"letters={folders / 'letters'},mixture={folder / 'mixture'},scaled={folder / 'scaled'}"


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of adapters in each shared pass."""
    seen: list[int] = []
    real = SideBySide.readings

    def count(
        self: SideBySide, batch: TokenBatch, draws: Sequence[Draws], adapters: Sequence[int], states: Any = None
    ) -> list[Reading]:
        seen.append(len(set(adapters)))
        return real(self, batch, draws, adapters, states)

    monkeypatch.setattr(SideBySide, "readings", count)
    return seen


def _ask(client: TestClient, body: dict[str, Any]) -> list[dict[str, Any]]:
    response = client.post("/predict", json=body)
    assert response.status_code == 200, response.text
    return list(response.json()["predictions"])


def _together(client: TestClient, gate: Gate, bodies: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The answers to requests that wait together behind a pass which is held at the gate."""
    gate.open.clear()
    gate.entered.clear()
    with ThreadPoolExecutor(len(bodies) + 1) as pool:
        first = pool.submit(_ask, client, {"inputs": "held"})
        assert gate.entered.wait(30)
        futures = [pool.submit(_ask, client, body) for body in bodies]
        inputs = sum(1 if isinstance(body["inputs"], str) else len(body["inputs"]) for body in bodies)
        batcher = lifetime_of(client).serving().batcher

        def planned() -> int:
            """The inputs that have reached the queue, of which some are in the next pass, chosen among all of them."""
            slot = batcher._slot
            chosen = 0 if slot is None else len(slot.inputs)
            return 0 if batcher._stale or batcher._planning else chosen + len(batcher._queue)

        wait_until(lambda: planned() == inputs)
        gate.open.set()
        first.result(30)
        return [future.result(30) for future in futures]


def test_requests_for_several_adapters_share_passes_and_keep_their_answers(
    serve: Callable[..., TestClient], gate: Gate, shared: list[int], others: str
) -> None:
    gate.open.set()
    client = serve(load=gate.load, adapters=others)
    alone = [_ask(client, body) for body in BODIES]
    shared.clear()
    together = _together(client, gate, BODIES)
    assert max(shared) >= 2
    for expected, found in zip(alone, together, strict=True):
        for one, other in zip(expected, found, strict=True):
            assert one["num_samples"] == other["num_samples"]
            assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)
            assert one["mutual_information"] == pytest.approx(other["mutual_information"], abs=1e-5)


def test_waiting_requests_for_adapters_of_one_shape_are_one_pass(
    serve: Callable[..., TestClient], gate: Gate, shared: list[int], others: str
) -> None:
    gate.open.set()
    client = serve(load=gate.load, adapters=others)
    shared.clear()
    bodies: list[dict[str, Any]] = [
        {"inputs": name, "num_samples": 3, "adapter": name, "choices": CHOICES if name == "letters" else None}
        for name in ("colours", "scaled", "letters", "mixture")
    ]
    _together(client, gate, bodies)
    assert shared == [3], "the adapter of another scaling has a pass of its own"


def test_adapters_that_a_test_pass_shows_to_differ_share_no_pass(
    folders: Path, others: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(folders, adapters=others)
    shapes = [adapter.shape for adapter in load_engine(settings).adapters.values()]
    assert len(set(shapes)) == 2
    monkeypatch.setattr(transformers_engine, "agree_side_by_side", lambda *_: False)
    shapes = [adapter.shape for adapter in load_engine(settings).adapters.values()]
    assert len(set(shapes)) == 4
