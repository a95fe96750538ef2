"""A classification's answer restricted to some of the adapter's choices, by `choices` of the request."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from scalabl.model.token_batch import TokenBatch
from scalabl.prompt import Prompter
from scalabl.uncertainty.linearized import linearize
from scalabl.uncertainty.predictive import Predictive, predictive
from tests import tiny

IDS = Prompter(tiny.CLASSIFICATION, tiny.tokenizer()).encode("moss")
BLUE_RED = [2, 0]  # the order of the request, not the adapter's


def ask(client: TestClient, **body: Any) -> dict[str, Any]:
    response = client.post("/predict", json={"inputs": "moss", "choices": ["blue", "red"], **body})
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def check(prediction: dict[str, Any], expected: Predictive) -> None:
    probabilities = expected.probabilities.tolist()
    assert prediction["probabilities"] == pytest.approx(dict(zip(["blue", "red"], probabilities, strict=True)), abs=1e-6)
    assert prediction["entropy"] == pytest.approx(float(expected.entropy), abs=1e-6)
    assert prediction["mutual_information"] == pytest.approx(float(expected.mutual_information), abs=1e-6)
    assert prediction["prediction"] == ["blue", "red"][prediction["index"]] == max(["blue", "red"], key=_of(prediction))


def _of(prediction: dict[str, Any]) -> Any:
    return prediction["probabilities"].__getitem__


def test_samples_are_normalised_over_the_choices_of_the_request(colours: TestClient) -> None:
    model = tiny.adapted()
    draws = model.draws(16)
    expected = predictive(model.logits(TokenBatch.of([IDS]), draws)[0, :, BLUE_RED], scheme=draws.scheme)
    check(ask(colours)["predictions"][0], expected)


def test_so_is_the_linearisation(colours: TestClient) -> None:
    linear = linearize(tiny.adapted(), TokenBatch.of([IDS])).of_choices(BLUE_RED)
    check(ask(colours, method="linearized")["predictions"][0], linear.predictive().of_input(0))


def test_samples_until_there_are_enough_are_those_of_a_fixed_number(colours: TestClient) -> None:
    (adaptive,) = ask(colours, num_samples="auto")["predictions"]
    (fixed,) = ask(colours, num_samples=adaptive["num_samples"])["predictions"]
    assert adaptive["probabilities"] == pytest.approx(fixed["probabilities"], abs=1e-6)


def test_the_control_variate_agrees_with_many_samples(colours: TestClient) -> None:
    expected = ask(colours, num_samples=256)["predictions"][0]["probabilities"]
    controlled = ask(colours, method="control_variate")["predictions"][0]["probabilities"]
    assert controlled == pytest.approx(expected, abs=0.03)


def test_all_of_the_adapters_choices_give_the_answer_without_the_field(colours: TestClient) -> None:
    whole, named = ask(colours, choices=None), ask(colours, choices=["red", "green", "blue"])
    assert named["predictions"][0]["probabilities"] == whole["predictions"][0]["probabilities"]


def test_inputs_may_have_lists_of_their_own(colours: TestClient) -> None:
    answers = ask(colours, inputs=["moss", "sky"], choices=[["red", "green"], ["green", "blue"]])["predictions"]
    assert [list(answer["probabilities"]) for answer in answers] == [["red", "green"], ["green", "blue"]]


def test_feedback_names_a_choice_of_the_request(colours: TestClient) -> None:
    prediction = ask(colours)["predictions"][0]
    assert colours.post("/feedback", json={"id": prediction["id"], "label": "green"}).status_code == 422
    assert colours.post("/feedback", json={"id": prediction["id"], "label": "red"}).status_code == 200
