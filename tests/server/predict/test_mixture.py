"""A server with a mixture: every method answers with its members, and too few samples are refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from scalabl.model.token_batch import TokenBatch
from scalabl.prompt import Prompter
from scalabl.uncertainty.linearized import controlled, linearize
from scalabl.uncertainty.predictive import predictive
from tests import tiny
from tests.server.conftest import serving, settings_for
from tests.server.web.test_refusals import refused

TEXT = "the grass after rain"


@pytest.fixture(scope="module")
def mixture(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    folder = tiny.write_adapter(tmp_path_factory.mktemp("mixture") / "mixture", **tiny.MIXTURE)
    with serving(settings_for(folders, adapter=folder)) as client:
        yield client


def _answer(client: TestClient, **body: Any) -> dict[str, Any]:
    response = client.post("/predict", json={"inputs": TEXT} | body)
    assert response.status_code == 200, response.text
    return dict(response.json()["predictions"][0])


@pytest.mark.parametrize("method", ["monte_carlo", "linearized", "control_variate"])
def test_it_answers_as_the_model_does(mixture: TestClient, method: str) -> None:
    model = tiny.mixture()
    batch = TokenBatch.of([Prompter(tiny.CLASSIFICATION, tiny.tokenizer()).encode(TEXT)])
    draws = model.draws(7)
    expected = {
        "monte_carlo": lambda: predictive(model.logits(batch, draws), 1.0, draws.scheme, 3),
        "linearized": lambda: linearize(model, batch).predictive(),
        "control_variate": lambda: controlled(model.logits(batch, draws), linearize(model, batch), draws),
    }[method]()
    more = {} if method == "linearized" else {"num_samples": 7}
    answer = _answer(mixture, method=method, **more)
    assert list(answer["probabilities"].values()) == pytest.approx(expected.probabilities[0].tolist(), abs=1e-4)
    assert answer["mutual_information"] == pytest.approx(float(expected.mutual_information[0]), abs=1e-4)
    if method == "monte_carlo":
        errors = list(answer["standard_error"]["probabilities"].values())
        assert errors == pytest.approx(expected.standard_error.probabilities[0].tolist(), abs=1e-4)


def test_adaptive_samples_come_in_rounds_that_are_even_over_members(mixture: TestClient) -> None:
    found = _answer(mixture, num_samples="auto", target="probabilities", tolerance=0.2)
    assert found["num_samples"] in (9, 18, 36, 64)
    fixed = _answer(mixture, num_samples=found["num_samples"])
    assert found["probabilities"] == pytest.approx(fixed["probabilities"], abs=1e-5)


def test_each_member_needs_a_sample(mixture: TestClient) -> None:
    response = mixture.post("/predict", json={"inputs": TEXT, "num_samples": 2})
    message = "num_samples: 2 is below 3: this adapter is a mixture of 3 members, and each needs a sample"
    refused(response, 422, "invalid-field", message)
    answer = _answer(mixture, num_samples=3)
    assert set(answer["standard_error"]["probabilities"].values()) == {None}, "one sample of a member has no spread"


def test_info_counts_members(mixture: TestClient) -> None:
    adapter = mixture.get("/info").json()["adapter"]
    assert (adapter["members"], adapter["stochastic_parameters"]) == (3, 3 * 5 * 4)
