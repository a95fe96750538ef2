"""The numbers of `/predict` equal those of the model called directly, whatever else the server does."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from scalabl.model.token_batch import TokenBatch
from scalabl.prompt import Prompter
from scalabl.uncertainty.predictive import Predictive, predictive
from tests import tiny

COLOURS = list(tiny.CLASSIFICATION.choices)


def _ask(client: TestClient, **body: Any) -> dict[str, Any]:
    response = client.post("/predict", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def _one(client: TestClient, **body: Any) -> dict[str, Any]:
    (prediction,) = _ask(client, **body)["predictions"]
    return dict(prediction)


def _method(text: str, num_samples: int = 16, seed: int = 0) -> Predictive:
    """The answer to the same input, computed with the model directly."""
    model = tiny.adapted()
    ids = Prompter(tiny.CLASSIFICATION, tiny.tokenizer()).encode(text)
    draws = model.draws(num_samples, seed)
    return predictive(model.logits(TokenBatch.of([ids]), draws)[0], scheme=draws.scheme)


@pytest.mark.parametrize(("num_samples", "seed"), [(16, 0), (5, 0), (16, 7), (32, 2**63 - 1)])
def test_the_answer_is_the_methods(colours: TestClient, num_samples: int, seed: int) -> None:
    answer = _one(colours, inputs="the grass after rain", num_samples=num_samples, seed=seed)
    expected = _method("the grass after rain", num_samples, seed)
    assert list(answer["probabilities"]) == COLOURS
    assert list(answer["probabilities"].values()) == pytest.approx(expected.probabilities.tolist(), abs=1e-6)
    for field in ("entropy", "expected_entropy", "mutual_information"):
        assert answer[field] == pytest.approx(float(getattr(expected, field)), abs=1e-6)
        error = float(getattr(expected.standard_error, field))
        assert answer["standard_error"][field] == pytest.approx(error, abs=1e-6)
    assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=1e-12)
    assert answer["prediction"] == COLOURS[answer["index"]]
    assert answer["confidence"] == max(answer["probabilities"].values()) == answer["probabilities"][answer["prediction"]]
    assert (answer["num_samples"], answer["method"], answer["abstain"]) == (num_samples, "monte_carlo", None)


def test_the_defaults_are_the_servers(serve: Callable[..., TestClient]) -> None:
    client = serve(num_samples=6, seed=4, draw_scheme="gaussian", adapter_name="mine")
    answer = _ask(client, inputs="rose")
    assert (answer["adapter"], answer["model"]) == ("mine", "base")
    assert answer["predictions"][0]["num_samples"] == 6
    model = tiny.adapted()
    ids = Prompter(tiny.CLASSIFICATION, tiny.tokenizer()).encode("rose")
    expected = predictive(model.logits(TokenBatch.of([ids]), model.draws(6, 4, "gaussian"))[0])
    assert answer["predictions"][0]["entropy"] == pytest.approx(float(expected.entropy), abs=1e-6)


def test_the_envelope(colours: TestClient) -> None:
    answer = _ask(colours, inputs=["ab", "c"], num_samples=3, adapter="colours")
    assert set(answer) == {"id", "model", "adapter", "predictions", "usage"}
    tokens = len("ab\nLabel: ") + len("c\nLabel: ")
    assert answer["usage"] == {"tokens": tokens, "rows": 6}
    ids = [answer["id"], *(prediction["id"] for prediction in answer["predictions"])]
    assert len(set(ids)) == 3


def test_a_list_is_answered_in_its_order(colours: TestClient) -> None:
    texts = ["a rather long text about the sky", "x", "grass", "x"]
    together = _ask(colours, inputs=texts)["predictions"]
    for text, prediction in zip(texts, together, strict=True):
        alone = _one(colours, inputs=text)
        assert prediction["probabilities"] == pytest.approx(alone["probabilities"], abs=1e-5)


def test_samples_come_only_when_asked_for(colours: TestClient) -> None:
    assert "samples" not in _one(colours, inputs="rose")
    answer = _one(colours, inputs="rose", return_samples=True, num_samples=4)
    assert len(answer["samples"]) == 4
    for colour in COLOURS:
        assert sum(sample[colour] for sample in answer["samples"]) / 4 == pytest.approx(answer["probabilities"][colour])
    assert all(sum(sample.values()) == pytest.approx(1) for sample in answer["samples"])


def test_one_sample_knows_no_error_and_no_mutual_information(colours: TestClient) -> None:
    answer = _one(colours, inputs="rose", num_samples=1)
    assert answer["mutual_information"] == 0
    assert answer["standard_error"]["entropy"] is None
    assert set(answer["standard_error"]["probabilities"].values()) == {None}


def test_truncation_is_done_only_when_asked_for(colours: TestClient) -> None:
    assert colours.post("/predict", json={"inputs": "sky " * 60}).status_code == 413
    answer = _ask(colours, inputs="sky " * 60, truncate=True)
    assert answer["usage"]["tokens"] == 120


def test_multiple_choice_ranks_the_choices_of_each_input(letters: TestClient) -> None:
    per_input = [["red", "green"], ["one", "two", "three", "four"]]
    first, second = _ask(letters, inputs=["why", "how"], choices=per_input)["predictions"]
    assert list(first["probabilities"]) == per_input[0]
    assert list(second["probabilities"]) == per_input[1]
    for prediction in (first, second):
        assert sum(prediction["probabilities"].values()) == pytest.approx(1)
        assert prediction["entropy"] <= math.log(len(prediction["probabilities"]))
    shared = _ask(letters, inputs=["why", "how"], choices=["red", "green"])["predictions"]
    assert shared[0]["probabilities"] == pytest.approx(first["probabilities"], abs=1e-5)
    assert list(shared[1]["probabilities"]) == ["red", "green"]


def test_multiple_choice_is_the_methods_over_the_letters_given(letters: TestClient) -> None:
    answer = _one(letters, inputs="2 + 2", choices=["three", "four", "five"])
    model = tiny.adapted(task=tiny.MULTIPLE_CHOICE)
    ids = Prompter(tiny.MULTIPLE_CHOICE, tiny.tokenizer()).encode("2 + 2", ["three", "four", "five"])
    draws = model.draws(16)
    expected = predictive(model.logits(TokenBatch.of([ids]), draws)[0, :, :3], scheme=draws.scheme)
    assert list(answer["probabilities"].values()) == pytest.approx(expected.probabilities.tolist(), abs=1e-6)


@pytest.mark.parametrize(("mode", "tokens"), [("text", 15), ("control", 11)])
def test_special_tokens_in_an_input_are_what_the_adapter_says(
    mode: str, tokens: int, serve: Callable[..., TestClient], tmp_path: Path
) -> None:
    tiny.write_adapter(tmp_path / "a", task=tiny.CLASSIFICATION.model_copy(update={"special_tokens_in_text": mode}))
    assert _ask(serve(adapter=tmp_path / "a"), inputs="a<eos>b")["usage"]["tokens"] == tokens


def test_a_temperature_of_the_adapter_is_applied(folders: Path, serve: Callable[..., TestClient], tmp_path: Path) -> None:
    tiny.write_adapter(tmp_path / "hot", temperature=3.0)
    hot = _one(serve(adapter=tmp_path / "hot"), inputs="rose")
    model = tiny.adapted()
    ids = Prompter(tiny.CLASSIFICATION, tiny.tokenizer()).encode("rose")
    expected = predictive(model.logits(TokenBatch.of([ids]), model.draws(16))[0], temperature=3.0)
    assert list(hot["probabilities"].values()) == pytest.approx(expected.probabilities.tolist(), abs=1e-6)


def test_the_same_request_gives_the_same_numbers_alone_amid_traffic_and_on_another_replica(
    colours: TestClient, serve: Callable[..., TestClient]
) -> None:
    request = {"inputs": ["the sea at night", "moss"], "num_samples": 9, "seed": 3}
    alone = _ask(colours, **request)["predictions"]
    with ThreadPoolExecutor(16) as pool:
        noise = [pool.submit(_ask, colours, inputs="z" * (1 + 6 * n), num_samples=1 + n, seed=n) for n in range(12)]
        amid = [pool.submit(_ask, colours, **request) for _ in range(3)]
        answers = [future.result()["predictions"] for future in amid]
        assert all(future.result() for future in noise)
    answers += [_ask(colours, **request)["predictions"], _ask(serve(), **request)["predictions"]]
    for answer in answers:
        for one, other in zip(answer, alone, strict=True):
            assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)
            assert one["mutual_information"] == pytest.approx(other["mutual_information"], abs=1e-5)
    other = _ask(colours, **request | {"seed": 4})["predictions"]
    assert other[0]["probabilities"] != pytest.approx(alone[0]["probabilities"], abs=1e-4)


@settings(max_examples=40)
@given(st.text(min_size=1, max_size=25))
def test_any_text_gets_an_answer_or_a_reason(colours: TestClient, text: str) -> None:
    response = colours.post("/predict", json={"inputs": text})
    assert response.status_code in (200, 422)
    assert (response.status_code == 422) == (not text.strip())


@pytest.mark.parametrize("text", ["🙂🙃 emoji", "北京烤鸭", "cafe\u0301", "{input}", "\x00\x07 bell", "<eos>", "a\u2028b"])
def test_unusual_text_is_taken_as_it_is(colours: TestClient, text: str) -> None:
    assert sum(_one(colours, inputs=text)["probabilities"].values()) == pytest.approx(1)
