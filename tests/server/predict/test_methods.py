"""`/predict` with linearisation: its numbers, alone and in one batch with samples; its refusals and its warning."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from scalabl_server.engines.interface import Engine
from scalabl_server.engines.load import load_engine
from scalabl_server.settings import ServeSettings

from scalabl.files.adapter_directory import save_adapter
from scalabl.model.token_batch import TokenBatch
from scalabl.prompt import Prompter
from scalabl.uncertainty.linearized import controlled, linearize
from tests import tiny
from tests.server.conftest import model_of, serving, settings_for


def _ask(client: TestClient, **body: Any) -> dict[str, Any]:
    response = client.post("/predict", json=body)
    assert response.status_code == 200, response.text
    return dict(response.json())


@pytest.fixture(scope="module")
def narrow(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A server whose adapter has a sigma that is small against mu."""
    model = tiny.adapted(temperature=1.3)
    with torch.no_grad():
        for layer in model.adapted.values():
            layer.s_log_std.sub_(3.0)
    folder = tmp_path_factory.mktemp("narrow") / "narrow"
    save_adapter(folder, model.config, dict(model.adapter_parameters()))
    with serving(settings_for(folders, adapter=folder)) as client:
        yield client


def test_the_answer_is_the_linearisations(colours: TestClient) -> None:
    (answer,) = _ask(colours, inputs="the grass after rain", method="linearized")["predictions"]
    model = tiny.adapted()
    ids = Prompter(tiny.CLASSIFICATION, tiny.tokenizer()).encode("the grass after rain")
    expected = linearize(model, TokenBatch.of([ids])).predictive()
    assert list(answer["probabilities"].values()) == pytest.approx(expected.probabilities[0].tolist(), abs=1e-4)
    for field in ("entropy", "expected_entropy", "mutual_information"):
        assert answer[field] == pytest.approx(float(getattr(expected, field)[0]), abs=1e-4)
        assert answer["standard_error"][field] is None
    assert (answer["method"], answer["num_samples"]) == ("linearized", 0)
    assert "layer_shares" not in answer


def test_it_agrees_with_many_samples_where_sigma_is_small(narrow: TestClient) -> None:
    texts = ["rose", "the sea at night"]
    linear = _ask(narrow, inputs=texts, method="linearized")["predictions"]
    sampled = _ask(narrow, inputs=texts, num_samples=256)["predictions"]
    for one, other in zip(linear, sampled, strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=2e-3)
        assert one["mutual_information"] == pytest.approx(other["mutual_information"], rel=0.1)


def test_samples_with_their_linearisation_are_corrected_by_it(colours: TestClient) -> None:
    body: dict[str, Any] = {"inputs": "the grass after rain", "method": "control_variate", "num_samples": 8, "seed": 3}
    response = _ask(colours, **body, explain=True, return_samples=True)
    (answer,) = response["predictions"]
    model = tiny.adapted()
    batch = TokenBatch.of([Prompter(tiny.CLASSIFICATION, tiny.tokenizer()).encode("the grass after rain")])
    draws = model.draws(8, 3)
    expected = controlled(model.logits(batch, draws), linearize(model, batch), draws)
    assert list(answer["probabilities"].values()) == pytest.approx(expected.probabilities[0].tolist(), abs=1e-4)
    assert answer["mutual_information"] == pytest.approx(float(expected.mutual_information[0]), abs=1e-4)
    error = float(expected.standard_error.mutual_information[0])
    assert answer["standard_error"]["mutual_information"] == pytest.approx(error, rel=1e-2)
    assert (answer["method"], answer["num_samples"], len(answer["samples"])) == ("control_variate", 8, 8)
    assert sum(answer["layer_shares"].values()) == pytest.approx(1)
    assert response["usage"]["rows"] == 8 + 3
    assert "warnings" not in response, "it is not biased, however wide the posterior"


def test_explained_answers_share_their_doubt_out_over_the_layers(colours: TestClient) -> None:
    (answer,) = _ask(colours, inputs="rose", method="linearized", explain=True)["predictions"]
    assert list(answer["layer_shares"]) == list(tiny.adapted().adapted)
    assert sum(answer["layer_shares"].values()) == pytest.approx(1)
    assert all(share >= 0 for share in answer["layer_shares"].values())


def test_all_methods_at_once_give_what_each_gives_alone(colours: TestClient) -> None:
    bodies: list[dict[str, Any]] = [
        {"inputs": "y" * (1 + 5 * n), "method": ("linearized", "monte_carlo", "control_variate")[n % 3]} for n in range(12)
    ]
    alone = [_ask(colours, **body)["predictions"][0] for body in bodies]
    with ThreadPoolExecutor(12) as pool:
        together = [future.result()["predictions"][0] for future in [pool.submit(_ask, colours, **b) for b in bodies]]
    for one, other in zip(alone, together, strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)


def test_multiple_choice_is_linearised_over_the_choices_given(letters: TestClient) -> None:
    choices = [["red", "green"], ["one", "two", "three"]]
    answers = _ask(letters, inputs=["why", "how"], choices=choices, method="linearized")["predictions"]
    for names, answer in zip(choices, answers, strict=True):
        assert list(answer["probabilities"]) == names
        assert sum(answer["probabilities"].values()) == pytest.approx(1)
        assert answer["entropy"] <= math.log(len(names))


def test_letters_that_an_input_has_no_choice_for_take_nothing_from_its_doubt(
    letters: TestClient, serve: Callable[..., TestClient]
) -> None:
    def load(settings: ServeSettings) -> Engine:
        engine = load_engine(settings)
        tiny.prefer(model_of(engine), (2, 3))
        return engine

    # In one pass with an input that has the letters: only what an input itself lacks is left out.
    body = {"inputs": ["why", "how"], "choices": [["red", "green"], ["one", "two", "three", "four"]]}
    expected, _ = _ask(letters, **body, method="linearized")["predictions"]
    found, other = _ask(serve("letters", load), **body, method="linearized")["predictions"]
    assert found["mutual_information"] > 1e-2
    assert found["mutual_information"] == pytest.approx(expected["mutual_information"], abs=1e-4)
    assert found["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-4)
    assert other["probabilities"]["three"] + other["probabilities"]["four"] > 0.999


def test_a_wide_posterior_is_warned_of_and_a_narrow_one_is_not(colours: TestClient, narrow: TestClient) -> None:
    (warning,) = _ask(colours, inputs="rose", method="linearized")["warnings"]
    assert warning.startswith("the linearized method is biased for the adapter 'colours': its median sigma / |mu| is ")
    assert "warnings" not in _ask(colours, inputs="rose")
    assert "warnings" not in _ask(narrow, inputs="rose", method="linearized")
    spreads = [client.get("/info").json()["adapter"]["relative_spread"] for client in (colours, narrow)]
    assert spreads[0] > 0.5 > spreads[1]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"method": "linearized", "num_samples": 8}, "num_samples: the linearized method draws no samples"),
        ({"method": "linearized", "seed": 0}, "seed: the linearized method draws no samples"),
        ({"method": "linearized", "return_samples": True}, "return_samples: the linearized method draws no samples"),
        ({"explain": True}, "explain: the method monte_carlo cannot attribute the variance to layers"),
        ({"method": "control_variate", "num_samples": 10**6}, "num_samples: 1000000 is above"),
        ({"method": "guess"}, "method: Input should be 'monte_carlo', 'linearized' or 'control_variate'"),
    ],
)
def test_what_a_method_cannot_do_is_refused(body: dict[str, Any], message: str, colours: TestClient) -> None:
    response = colours.post("/predict", json={"inputs": "rose", **body})
    assert response.status_code == 422
    assert response.json()["detail"].startswith(message)


def test_an_input_too_large_for_the_rows_of_its_choices_is_refused(serve: Callable[..., TestClient]) -> None:
    client = serve(max_batch_tokens=60, num_samples=1)
    response = client.post("/predict", json={"inputs": "z" * 30, "method": "linearized"})
    assert response.status_code == 413
    assert "x 3 " in response.json()["detail"]
