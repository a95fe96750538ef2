"""`num_samples: "auto"`: the answers equal those with the same number of samples; refusals; how its rows are counted."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from tests.server.conftest import model_of
from tests.server.web.test_limits import lifetime_of
from tests.server.web.test_refusals import refused

TEXTS = ["the grass after rain", "rose", "the sea at night", "blood", "why", "sky blue", "hello there", "a", "zz top"]


def _ask(client: TestClient, **body: Any) -> dict[str, Any]:
    response = client.post("/predict", json=body)
    assert response.status_code == 200, response.text
    return dict(response.json())


def _same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["num_samples"] == other["num_samples"]
    assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)
    assert one["mutual_information"] == pytest.approx(other["mutual_information"], abs=1e-5)
    assert one["standard_error"]["probabilities"] == pytest.approx(other["standard_error"]["probabilities"], abs=1e-5)


def test_the_answer_is_that_of_the_samples_it_took_and_decides_as_all_of_them(colours: TestClient) -> None:
    response = _ask(colours, inputs=TEXTS, num_samples="auto")
    taken = [each["num_samples"] for each in response["predictions"]]
    assert set(taken) <= {8, 16, 32, 64}
    assert len(set(taken)) > 1
    assert response["usage"]["rows"] == sum(taken)
    for text, found in zip(TEXTS, response["predictions"], strict=True):
        (fixed,) = _ask(colours, inputs=text, num_samples=found["num_samples"])["predictions"]
        _same(found, fixed)
        (full,) = _ask(colours, inputs=text, num_samples=64)["predictions"]
        assert found["prediction"] == full["prediction"]


@pytest.mark.parametrize(("target", "tolerance"), [("probabilities", 0.1), ("mutual_information", 0.1)])
def test_a_number_has_the_standard_error_asked_for(colours: TestClient, target: str, tolerance: float) -> None:
    body = {"inputs": TEXTS, "num_samples": "auto", "target": target}
    answers = _ask(colours, **body, tolerance=tolerance)["predictions"]
    assert min(each["num_samples"] for each in answers) < 64
    for each in answers:
        error = each["standard_error"][target]
        worst = max(error.values()) if isinstance(error, dict) else error
        assert worst <= tolerance or each["num_samples"] == 64
    stricter = _ask(colours, **body, tolerance=tolerance / 4)["predictions"]
    assert sum(each["num_samples"] for each in stricter) > sum(each["num_samples"] for each in answers)


def test_all_at_once_they_get_what_each_gets_alone(colours: TestClient) -> None:
    bodies: list[dict[str, Any]] = [
        {"inputs": text, **more}
        for text in TEXTS[:4]
        for more in (
            {"num_samples": "auto"},
            {"num_samples": "auto", "target": "probabilities", "tolerance": 0.05, "seed": 3},
            {"num_samples": 16},
            {"method": "linearized"},
        )
    ]
    alone = [_ask(colours, **body)["predictions"][0] for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        futures = [pool.submit(_ask, colours, **body) for body in bodies]
        together = [future.result()["predictions"][0] for future in futures]
    for one, other in zip(alone, together, strict=True):
        assert one["num_samples"] == other["num_samples"]
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)


def test_each_input_of_a_multiple_choice_is_settled_over_its_own_choices(letters: TestClient) -> None:
    choices = [["red", "green"], ["one", "two", "three"]]
    for names, found in zip(
        choices, _ask(letters, inputs=["why", "how"], choices=choices, num_samples="auto")["predictions"], strict=True
    ):
        text = "why" if len(names) == 2 else "how"
        (fixed,) = _ask(letters, inputs=text, choices=names, num_samples=found["num_samples"])["predictions"]
        _same(found, fixed)


def test_passes_hold_only_the_inputs_that_go_on(serve: Callable[..., TestClient]) -> None:
    client = serve(target_batch_tokens=10_000)
    usage = _ask(client, inputs=TEXTS, num_samples="auto")["usage"]
    assert usage["rows"] < 64 * len(TEXTS)
    families = text_string_to_metric_families(client.get("/metrics").text)
    counts = {sample.name: sample.value for family in families for sample in family.samples}
    assert counts["scalabl_batch_rows_sum"] == usage["rows"]


def test_returned_samples_are_those_that_it_took(colours: TestClient) -> None:
    for each in _ask(colours, inputs=TEXTS[:3], num_samples="auto", return_samples=True)["predictions"]:
        assert len(each["samples"]) == each["num_samples"]


def test_the_servers_limit_is_the_most_it_takes(serve: Callable[..., TestClient]) -> None:
    client = serve(max_samples=5, num_samples=4)
    assert {each["num_samples"] for each in _ask(client, inputs=TEXTS, num_samples="auto")["predictions"]} == {5}


def test_a_pass_must_be_able_to_hold_its_largest_round(serve: Callable[..., TestClient]) -> None:
    client = serve(max_batch_tokens=1300)
    assert client.post("/predict", json={"inputs": "z" * 30, "num_samples": "auto"}).status_code == 200
    refused(
        client.post("/predict", json={"inputs": "z" * 40, "num_samples": "auto"}), 413, "input-too-large", "x 32 samples"
    )


def test_logits_that_are_not_finite_are_no_answer(serve: Callable[..., TestClient]) -> None:
    client = serve()
    model_of(lifetime_of(client).serving().engine).adapted["lm_head"].lora_B.fill_(float("inf"))
    refused(
        client.post("/predict", json={"inputs": "a", "num_samples": "auto"}),
        500,
        "internal-error",
        "logits that are not finite for inputs.0",
    )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"num_samples": "many"}, "num_samples: Input should be a valid integer or Input should be 'auto'"),
        ({"target": "decision"}, "target: the field is only for num_samples 'auto'"),
        ({"tolerance": 0.1, "num_samples": 8}, "tolerance: the field is only for num_samples 'auto'"),
        ({"num_samples": "auto", "target": "entropy"}, "target: Input should be 'decision', 'probabilities' or"),
        ({"num_samples": "auto", "tolerance": 0}, "tolerance: Input should be greater than 0"),
        (
            {"num_samples": "auto", "tolerance": 1.0},
            "tolerance: 1 is not below 1; for the target decision the tolerance is a probability",
        ),
        ({"num_samples": "auto", "method": "linearized"}, "num_samples: the linearized method draws no samples"),
        ({"num_samples": "auto", "method": "control_variate"}, "num_samples: 'auto' is only for the method monte_carlo"),
        (
            {"num_samples": "auto", "explain": True},
            "explain: the method monte_carlo cannot attribute the variance to layers",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(body: dict[str, Any], message: str, colours: TestClient) -> None:
    refused(colours.post("/predict", json={"inputs": "rose", **body}), 422, "invalid-field", message)
