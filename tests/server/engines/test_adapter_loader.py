"""Several adapters in one server: each request is answered by the adapter that it names."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests import tiny
from tests.server.web.test_refusals import ask, refused


@pytest.fixture
def both(serve: Callable[..., TestClient], folders: Path) -> TestClient:
    return serve(adapters=f"letters={folders / 'letters'}")


def _probabilities(client: TestClient, **body: Any) -> list[float]:
    response = ask(client, **body)
    assert response.status_code == 200, response.text
    return list(response.json()["predictions"][0]["probabilities"].values())


def test_a_request_names_its_adapter_and_gets_what_that_adapter_answers_alone(
    both: TestClient, colours: TestClient, letters: TestClient
) -> None:
    choices = ["one", "two", "three"]
    expected = {
        "colours": _probabilities(colours, inputs="a text"),
        "letters": _probabilities(letters, inputs="a text", choices=choices),
    }
    requests = [("colours", {}), ("letters", {"choices": choices})] * 8
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda r: _probabilities(both, inputs="a text", adapter=r[0], **r[1]), requests))
    for (name, _), answer in zip(requests, answers, strict=True):
        assert answer == pytest.approx(expected[name], abs=1e-5)


def test_the_default_adapter_answers_when_none_is_named(both: TestClient) -> None:
    assert ask(both, inputs="a").json()["adapter"] == "colours"
    assert ask(both, inputs="a", adapter="letters", choices=["x", "y"]).json()["adapter"] == "letters"
    refused(ask(both, inputs="a", adapter="letters"), 422, "invalid-field", "this adapter's task is multiple_choice")


def test_an_unknown_adapter_is_told_which_there_are(both: TestClient) -> None:
    detail = "adapter: 'other' is not loaded; this server has 'colours', 'letters'"
    refused(ask(both, inputs="a", adapter="other"), 404, "unknown-adapter", detail)


def test_info_lists_every_adapter_and_the_default_one(both: TestClient) -> None:
    info = both.get("/info").json()
    assert info["adapter"]["name"] == "colours"
    assert [each["name"] for each in info["adapters"]] == ["colours", "letters"]
    assert info["adapters"][1]["choices"] == list(tiny.MULTIPLE_CHOICE.choices)


def test_metrics_tell_the_adapters_apart(both: TestClient) -> None:
    ask(both, inputs=["a", "b"])
    ask(both, inputs="a", adapter="letters", choices=["x", "y"])
    text = both.get("/metrics").text
    assert 'scalabl_predictions_total{adapter="colours"} 2.0' in text
    assert 'scalabl_predictions_total{adapter="letters"} 1.0' in text
