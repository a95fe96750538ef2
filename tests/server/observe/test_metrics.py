"""`/metrics` counts requests, passes and predictions, with labels of few values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from tests import tiny
from tests.server.conftest import serving, settings_for


def _samples(client: TestClient) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(client.get("/metrics").text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


@pytest.fixture
def client(serve: Callable[..., TestClient]) -> TestClient:
    return serve()


def test_every_metric_is_ours_and_explained(client: TestClient) -> None:
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    families = list(text_string_to_metric_families(response.text))
    assert len(families) >= 10
    for family in families:
        assert family.name.startswith(("scalabl_", "process_"))
        assert family.documentation


def test_requests_are_counted_by_route_method_and_code(client: TestClient) -> None:
    client.post("/predict", json={"inputs": "a"})
    client.post("/predict", json={"inputs": "a"})
    client.post("/predict", json={"inputs": ""})
    client.get("/predict")
    counts = _samples(client)
    for code, method, count in (("200", "POST", 2), ("422", "POST", 1), ("405", "GET", 1)):
        labels = (("code", code), ("method", method), ("route", "/predict"))
        assert counts["scalabl_requests_total", labels] == count
    assert counts["scalabl_request_duration_seconds_count", (("route", "/predict"),)] == 4


def test_unknown_paths_and_odd_methods_share_a_label(client: TestClient) -> None:
    for path in ("/a", "/b", "/predict/c"):
        client.get(path)
    client.request("BREW", "/predict")
    counts = _samples(client)
    assert counts["scalabl_requests_total", (("code", "404"), ("method", "GET"), ("route", "unmatched"))] == 3
    assert counts["scalabl_requests_total", (("code", "405"), ("method", "other"), ("route", "/predict"))] == 1


def test_predictions_and_their_uncertainty_are_counted(client: TestClient) -> None:
    client.post("/predict", json={"inputs": ["a", "bb", "ccc"], "num_samples": 4})
    counts = _samples(client)
    adapter = (("adapter", "colours"),)
    assert counts["scalabl_predictions_total", adapter] == 3
    for name in ("confidence", "entropy_nats", "mutual_information_nats"):
        assert counts[f"scalabl_prediction_{name}_count", adapter] == 3
    assert counts["scalabl_batch_rows_sum", ()] == 12
    assert counts["scalabl_batch_tokens_sum", ()] >= 12 * 10
    for stage, count in (("queue", 3), ("tokenise", 1), ("total", 1)):
        assert counts["scalabl_stage_duration_seconds_count", (("stage", stage),)] == count
    assert counts["scalabl_stage_duration_seconds_count", (("stage", "forward"),)] >= 1
    assert counts["scalabl_queue_inputs", ()] == counts["scalabl_queue_tokens", ()] == 0
    assert counts["scalabl_queue_limit_inputs", ()] == 1024
    assert counts["scalabl_queue_limit_tokens", ()] == 64 * 16384
    assert counts["scalabl_ready", ()] == 1


def test_refusals_failed_passes_and_losses_are_there_at_0_before_the_first(client: TestClient) -> None:
    counts = _samples(client)
    for reason in ("inputs", "tokens", "wait"):
        assert counts["scalabl_rejected_requests_total", (("reason", reason),)] == 0
    for kind in ("out-of-memory", "device", "error"):
        assert counts["scalabl_failed_passes_total", (("kind", kind),)] == 0
    assert counts["scalabl_predictions_unrecorded_total", (("adapter", "colours"),)] == 0


def test_padding_is_counted_where_passes_have_it(client: TestClient, tmp_path: Path) -> None:
    body = {"inputs": ["a", "a" * 9], "num_samples": 4}
    client.post("/predict", json=body)
    assert _samples(client)["scalabl_padding_tokens_total", ()] == 0
    tiny.write_base(tmp_path / "base", "gpt2")
    tiny.write_adapter(tmp_path / "adapter", "gpt2")
    with serving(settings_for(tmp_path, "adapter")) as other:
        other.post("/predict", json=body | {"inputs": "a" * 9})
        assert _samples(other)["scalabl_padding_tokens_total", ()] == 0
        other.post("/predict", json=body)
        assert _samples(other)["scalabl_padding_tokens_total", ()] == 4 * 8


def test_refused_inputs_are_no_predictions(client: TestClient) -> None:
    client.post("/predict", json={"inputs": ["a", ""]})
    assert ("scalabl_predictions_total", (("adapter", "colours"),)) not in _samples(client)
