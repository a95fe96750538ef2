"""Triton's own client against a real server: the same numbers as /predict, exactly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from tritonclient.utils import InferenceServerException

from tests.integration.support.process import Served, served, write_models

pytestmark = pytest.mark.integration

FLOATS = ("confidence", "entropy", "expected_entropy", "mutual_information")
OUTPUTS = ("prediction", "index", "probabilities", "prediction_id", *FLOATS)
KEY = "very-secret"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("inferred"))


@pytest.fixture(scope="module")
def colours(models: Path) -> Iterator[Served]:
    with served(models, api_keys=f"triton:{KEY}") as server:
        yield server


@pytest.fixture(scope="module")
def letters(models: Path) -> Iterator[Served]:
    with served(models, "letters") as server:
        yield server


def client_of(server: Served) -> triton.InferenceServerClient:
    return triton.InferenceServerClient(f"127.0.0.1:{server.port}")


def strings(name: str, values: Any) -> triton.InferInput:
    array = np.array(values, dtype=object)
    tensor = triton.InferInput(name, list(array.shape), "BYTES")
    tensor.set_data_from_numpy(array, binary_data=False)
    return tensor


# The same numbers up to float rounding: the second of two requests may begin after a cached prefix.
ROUNDING = {"rel": 0, "abs": 1e-6}
WANTED = [triton.InferRequestedOutput(name, binary_data=False) for name in OUTPUTS]


def auth() -> dict[str, str]:
    """Created anew for each call, because the client modifies it."""
    return {"Authorization": f"Bearer {KEY}"}


def same(result: triton.InferResult, predictions: list[dict[str, Any]]) -> None:
    assert result.as_numpy("prediction").tolist() == [p["prediction"] for p in predictions]
    assert result.as_numpy("index").tolist() == [p["index"] for p in predictions]
    for name in FLOATS:
        got = result.as_numpy(name)
        assert got.dtype == np.float64
        assert got.tolist() == pytest.approx([p[name] for p in predictions], **ROUNDING)
    for row, prediction in zip(result.as_numpy("probabilities").tolist(), predictions, strict=True):
        assert row == pytest.approx(list(prediction["probabilities"].values()), **ROUNDING)
    assert len(set(result.as_numpy("prediction_id").tolist())) == len(predictions)


def test_triton_sees_a_server_and_a_model_that_are_ready(colours: Served) -> None:
    client = client_of(colours)
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("colours", headers=auth())
    assert client.is_model_ready("colours", "1", headers=auth())
    assert not client.is_model_ready("other", headers=auth())
    assert client.get_server_metadata(headers=auth())["name"] == "scalabl"
    assert client.get_model_metadata("colours", headers=auth())["parameters"]["choices"] == ["red", "green", "blue"]


@pytest.mark.parametrize("texts", [["abc"], ["abc", "zzzz", "caf\u00e9 \u2013 \U0001f600"]])
def test_triton_gets_the_numbers_of_predict(colours: Served, texts: list[str]) -> None:
    body = {"inputs": texts, "num_samples": 7, "seed": 11}
    predicted = httpx.post(f"{colours.url}/predict", json=body, headers=auth()).json()["predictions"]
    result = client_of(colours).infer(
        "colours",
        [strings("text", texts)],
        outputs=WANTED,
        request_id="mine",
        headers=auth(),
        parameters={"num_samples": 7, "seed": 11},
    )
    same(result, predicted)
    assert result.get_response()["id"] == "mine"
    asynchronous = client_of(colours).async_infer(
        "colours", [strings("text", texts)], "1", outputs=WANTED, headers=auth(), parameters={"num_samples": 7, "seed": 11}
    )
    same(asynchronous.get_result(), predicted)


def test_triton_needs_neither_outputs_nor_flags(colours: Served) -> None:
    """Without named outputs it asks for all of them in binary, and reads the JSON that it gets."""
    predicted = httpx.post(f"{colours.url}/predict", json={"inputs": "abc"}, headers=auth()).json()["predictions"]
    client, tensor = client_of(colours), strings("text", ["abc"])
    same(client.infer("colours", [tensor], headers=auth()), predicted)
    named = [triton.InferRequestedOutput(name) for name in OUTPUTS]  # binary, its default
    same(client.infer("colours", [tensor], outputs=named, headers=auth(), timeout=10**6, sequence_id=4), predicted)


def test_triton_sends_choices_as_a_tensor(letters: Served) -> None:
    texts, choices = ["why", "how"], [["a", "bc", "d"], ["e", "f", "g"]]
    predicted = httpx.post(f"{letters.url}/predict", json={"inputs": texts, "choices": choices}).json()["predictions"]
    result = client_of(letters).infer("letters", [strings("text", texts), strings("choices", choices)], outputs=WANTED)
    same(result, predicted)


def test_triton_is_told_what_is_wrong(colours: Served) -> None:
    client = client_of(colours)
    tensor = strings("text", ["a"])
    raw = triton.InferInput("text", [1], "BYTES")
    raw.set_data_from_numpy(np.array(["a"], dtype=object))
    with pytest.raises(InferenceServerException, match="pass binary_data=False to set_data_from_numpy") as binary:
        client.infer("colours", [raw], outputs=WANTED, headers=auth())
    assert binary.value.status() == "415"
    with pytest.raises(InferenceServerException, match="adapter: 'other' is not loaded"):
        client.infer("other", [tensor], outputs=WANTED, headers=auth())
    with pytest.raises(InferenceServerException, match="the text is empty"):
        client.infer("colours", [strings("text", [""])], outputs=WANTED, headers=auth())
    with pytest.raises(InferenceServerException, match="send a key"):
        client.infer("colours", [tensor], outputs=WANTED)
    with pytest.raises(InferenceServerException, match="this server does not know the API key"):
        client.infer("colours", [tensor], outputs=WANTED, headers={"X-API-Key": "wrong"})
