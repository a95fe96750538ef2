"""The prefix cache, over HTTP: the answers equal those without it, and the metrics count its hits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from scalabl_server.engines.transformers_engine import LocalAdapter

from tests import tiny
from tests.server.conftest import settings_for
from tests.server.web.test_limits import lifetime_of

INSTRUCTION = "Say which colour this makes one think of: "  # 42 tokens, two blocks
OBJECTS = ["grass", "a rose", "the sea", "blood", "the sky at noon", "a forest"]


@pytest.fixture
def longer(folders: Any) -> str:
    """An adapter whose template begins with an instruction."""
    task = tiny.CLASSIFICATION.model_copy(update={"template": "Which colour? {input}\nLabel:"})
    if not (folders / "longer").exists():
        tiny.write_adapter(folders / "longer", task=task)
    return "longer"


def _metrics(client: TestClient) -> dict[str, float]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    prefix = "scalabl_prefix_cache_"
    return {s.name.removeprefix(prefix): s.value for f in families for s in f.samples if s.name.startswith(prefix)}


def _ask(client: TestClient, **body: Any) -> list[dict[str, Any]]:
    response = client.post("/predict", json=body)
    assert response.status_code == 200, response.text
    return list(response.json()["predictions"])


def test_answers_are_those_of_a_server_that_keeps_nothing(serve: Callable[..., TestClient]) -> None:
    keeping, other = serve(), serve(prefix_cache_bytes=0)
    texts = [INSTRUCTION + name for name in OBJECTS]
    bodies: list[dict[str, Any]] = [
        {"inputs": texts},
        {"inputs": [*texts, "blood", INSTRUCTION], "num_samples": 40, "seed": 3},
        {"inputs": texts, "num_samples": "auto"},
        {"inputs": texts, "num_samples": 5, "method": "control_variate"},
        {"inputs": texts[0]},
    ]
    for body in bodies:
        for one, expected in zip(_ask(keeping, **body), _ask(other, **body), strict=True):
            assert one["num_samples"] == expected["num_samples"]
            assert one["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-5)
            assert one["mutual_information"] == pytest.approx(expected["mutual_information"], abs=1e-5)
    found = _metrics(keeping)
    assert 0.5 < found["hit_tokens_total"] / found["queried_tokens_total"] < 1
    assert 0 < found["bytes"] <= found["limit_bytes"] == 2**29
    assert found["evictions_total"] == 0
    assert set(_metrics(other).values()) == {0}


def test_rounds_of_auto_find_what_fixed_numbers_left(serve: Callable[..., TestClient]) -> None:
    client = serve()
    _ask(client, inputs=[INSTRUCTION + name for name in OBJECTS], num_samples=64)
    before = _metrics(client)
    texts = [f"{INSTRUCTION}the {name}" for name in OBJECTS]
    taken = _ask(client, inputs=texts, num_samples="auto", target="probabilities", tolerance=0.1)
    after = _metrics(client)
    assert max(each["num_samples"] for each in taken) > 8
    assert after["hit_tokens_total"] - before["hit_tokens_total"] == 32 * len(OBJECTS)
    assert after["bytes"] == before["bytes"]


def test_the_template_s_beginning_is_kept_from_the_first_request_on(serve: Callable[..., TestClient], longer: str) -> None:
    client = serve(longer)
    hits = []
    for name in OBJECTS[:3]:
        _ask(client, inputs=name)
        hits.append(_metrics(client)["hit_tokens_total"])
    assert hits == [0, 14, 28]


def test_what_belongs_to_an_adapter_goes_with_it(serve: Callable[..., TestClient], folders: Any) -> None:
    client = serve(enable_adapter_loading=True, adapter_root=folders)
    texts = [INSTRUCTION + name for name in OBJECTS]
    _ask(client, inputs=texts)
    own = _metrics(client)["bytes"]
    assert client.post("/v1/load_lora_adapter", json={"lora_name": "second", "lora_path": "colours"}).status_code == 200
    _ask(client, inputs=texts, adapter="second")
    assert _metrics(client)["bytes"] == 2 * own
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "second"}).status_code == 200
    assert _metrics(client)["bytes"] == own
    assert _metrics(client)["evictions_total"] == 0


def test_the_bound_holds_under_ever_new_beginnings(serve: Callable[..., TestClient]) -> None:
    client = serve(prefix_cache_bytes=300_000)
    for number in range(6):
        _ask(client, inputs=[f"{number} {INSTRUCTION}{name}" for name in OBJECTS])
        assert 0 < _metrics(client)["bytes"] <= 300_000
    assert _metrics(client)["evictions_total"] > 0


def test_a_pass_that_does_not_fit_in_memory_runs_again_without_what_is_kept(serve: Callable[..., TestClient]) -> None:
    client = serve()
    texts = [INSTRUCTION + name for name in OBJECTS]
    _ask(client, inputs=texts)
    assert _metrics(client)["bytes"] > 0
    served = lifetime_of(client).serving().engine.adapter(None)
    assert isinstance(served, LocalAdapter)

    def fail(*_: object) -> None:
        handle.remove()
        raise torch.OutOfMemoryError("out of memory")

    handle = served.model.base.model.layers[1].register_forward_pre_hook(fail)
    _ask(client, inputs=texts[0])
    assert _metrics(client)["bytes"] == 0


def test_the_largest_pass_is_tried_without_what_would_make_it_smaller(
    folders: Any, serve: Callable[..., TestClient]
) -> None:
    client = serve(warmup="full", max_batch_tokens=4000)
    assert _metrics(client)["queried_tokens_total"] == 0


def test_a_bound_below_none_is_refused(folders: Any) -> None:
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        settings_for(folders, prefix_cache_bytes=-1)
