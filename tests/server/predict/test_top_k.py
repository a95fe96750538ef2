"""`top_k` cuts the probabilities of an answer and nothing else: not its set, not what is stored, not what is counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests import tiny
from tests.server.conftest import serving, settings_for

NAMES = ("other", "red", "green", "blue")  # a choice may be called like the field


def _one(client: TestClient, **body: Any) -> dict[str, Any]:
    response = client.post("/predict", json={"inputs": "a rose", **body})
    assert response.status_code == 200, response.text
    (prediction,) = response.json()["predictions"]
    return dict(prediction)


@pytest.fixture(scope="module")
def client(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = tmp_path_factory.mktemp("top_k")
    tiny.write_adapter(folder / "adapter", task=tiny.CLASSIFICATION.model_copy(update={"choices": NAMES}))
    settings = settings_for(folders, str(folder / "adapter"), outcomes_url=f"sqlite:///{folder / 'outcomes.db'}")
    with serving(settings) as client:
        yield client


def test_the_most_probable_choices_are_answered_and_the_rest_is_one_number(client: TestClient) -> None:
    whole, cut = _one(client), _one(client, top_k=2, return_samples=True)
    ranked = sorted(whole["probabilities"].items(), key=lambda item: -item[1])
    assert list(cut["probabilities"].items()) == ranked[:2]
    assert cut["other"] == pytest.approx(ranked[2][1] + ranked[3][1], rel=1e-12)
    assert cut["standard_error"]["probabilities"] == {
        name: whole["standard_error"]["probabilities"][name] for name, _ in ranked[:2]
    }
    assert [list(sample) for sample in cut["samples"]] == [[name for name, _ in ranked[:2]]] * cut["num_samples"]
    for field in ("prediction", "index", "confidence", "entropy", "mutual_information", "prediction_set"):
        assert cut[field] == whole[field]
    assert "other" not in whole


def test_a_top_k_above_the_number_of_choices_leaves_nothing_out(client: TestClient) -> None:
    prediction = _one(client, top_k=1000)
    assert (len(prediction["probabilities"]), prediction["other"]) == (4, 0.0)


def test_a_label_that_was_cut_off_is_stored_and_scored_like_any_other(client: TestClient) -> None:
    whole, cut = _one(client), _one(client, top_k=1)
    least = min(whole["probabilities"], key=whole["probabilities"].__getitem__)
    metrics = []
    for prediction in (whole, cut):
        assert client.post("/feedback", json={"id": prediction["id"], "label": least}).status_code == 200
        stored = client.get(f"/predictions/{prediction['id']}").json()
        assert stored["prediction"]["probabilities"] == pytest.approx(whole["probabilities"])
        text = client.get("/metrics").text
        metrics.append(
            sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith("scalabl_outcomes_brier_"))
        )
    assert metrics[1] == pytest.approx(2 * metrics[0])
    assert not any(name in line for line in text.splitlines() for name in ('"red"', '"green"', '"blue"'))


def test_samples_are_limited_by_what_is_answered(folders: Path, serve: Callable[..., TestClient]) -> None:
    client = serve(max_sample_values=40)
    refused = client.post("/predict", json={"inputs": "x", "return_samples": True})
    assert (refused.status_code, "48 probabilities" in refused.json()["detail"]) == (413, True)
    assert len(_one(client, return_samples=True, top_k=2)["samples"]) == 16


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "2"])
def test_a_top_k_that_is_no_positive_number_is_refused(value: Any, client: TestClient) -> None:
    refused = client.post("/predict", json={"inputs": "x", "top_k": value})
    assert (refused.status_code, refused.json()["detail"].startswith("top_k: ")) == (422, True)
