"""The Open Inference Protocol: metadata, input and output tensors, and errors in the protocol's own form."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

FLOATS = ("confidence", "entropy", "expected_entropy", "mutual_information")


def tensor(name: str, shape: list[int], data: list[Any], datatype: str = "BYTES", **more: Any) -> dict[str, Any]:
    return {"name": name, "shape": shape, "datatype": datatype, "data": data} | more


def infer(client: TestClient, *inputs: dict[str, Any], model: str = "colours", **more: Any) -> httpx.Response:
    return client.post(f"/v2/models/{model}/infer", content=json.dumps({"inputs": inputs} | more))


def outputs(response: httpx.Response) -> dict[str, dict[str, Any]]:
    assert response.status_code == 200, response.text
    return {output["name"]: output for output in response.json()["outputs"]}


def agrees(answer: httpx.Response, with_predict: httpx.Response) -> None:
    predictions = with_predict.json()["predictions"]
    got = outputs(answer)
    assert got["prediction"]["data"] == [p["prediction"] for p in predictions]
    assert got["index"]["data"] == [p["index"] for p in predictions]
    for name in FLOATS:
        assert got[name]["data"] == [p[name] for p in predictions]
    width = max(len(p["probabilities"]) for p in predictions)
    rows = [[*p["probabilities"].values(), *[0.0] * (width - len(p["probabilities"]))] for p in predictions]
    assert got["probabilities"]["shape"] == [len(predictions), width]
    assert got["probabilities"]["data"] == [value for row in rows for value in row]
    assert all(id.startswith("pred-") for id in got["prediction_id"]["data"])


def test_the_server_and_its_models_describe_themselves(colours: TestClient) -> None:
    assert colours.get("/v2").json()["name"] == "scalabl"
    assert colours.get("/v2/health/live").json() == {"live": True}
    assert colours.get("/v2/health/ready").json() == {"ready": True}
    for path in ("/v2/models/colours", "/v2/models/colours/versions/1"):
        model = colours.get(path).json()
        assert (model["name"], model["versions"], model["parameters"]["choices"]) == (
            "colours",
            ["1"],
            ["red", "green", "blue"],
        )
        assert model["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": [-1]}]
        assert {each["name"]: each["shape"] for each in model["outputs"]}["probabilities"] == [-1, 3]
        assert colours.get(f"{path}/ready").json() == {"name": "colours", "ready": True}


@pytest.mark.parametrize(("shape", "data"), [([2], ["abc", "de"]), ([2, 1], [["abc"], ["de"]]), ([2, 1], ["abc", "de"])])
def test_infer_gives_the_numbers_of_predict(colours: TestClient, shape: list[int], data: list[Any]) -> None:
    predicted = colours.post("/predict", json={"inputs": ["abc", "de"], "num_samples": 5, "seed": 3})
    answer = infer(colours, tensor("text", shape, data), id="mine", parameters={"num_samples": 5, "seed": 3})
    agrees(answer, predicted)
    assert (answer.json()["id"], answer.json()["model_name"], answer.json()["model_version"]) == ("mine", "colours", "1")


def test_a_prediction_that_is_not_stored_has_no_id(serve: Callable[..., TestClient]) -> None:
    answer = infer(serve(outcomes_url="none"), tensor("text", [1], ["abc"]))
    assert {each["name"]: each["data"] for each in answer.json()["outputs"]}["prediction_id"] == [""]


def test_choices_are_a_tensor_or_a_parameter(letters: TestClient) -> None:
    text = tensor("text", [2], ["why", "how"])
    shared = letters.post("/predict", json={"inputs": ["why", "how"], "choices": ["a", "bc"]})
    agrees(infer(letters, text, tensor("choices", [2], ["a", "bc"]), model="letters"), shared)
    for given in (["a", "bc"], json.dumps(["a", "bc"])):
        agrees(infer(letters, text, model="letters", parameters={"choices": given}), shared)
    each = letters.post("/predict", json={"inputs": ["why", "how"], "choices": [["a", "bc"], ["d", "e", "f"]]})
    filled = tensor("choices", [2, 3], [["a", "bc", ""], ["d", "e", "f"]])
    agrees(infer(letters, text, filled, model="letters"), each)
    assert letters.get("/v2/models/letters").json()["inputs"][1]["shape"] == [-1, -1]


def test_only_the_outputs_that_are_asked_for_come_back_in_their_order(colours: TestClient) -> None:
    wanted = [{"name": "entropy"}, {"name": "prediction", "parameters": {"binary_data": False}}]
    answer = infer(colours, tensor("text", [1], ["a"], parameters={"binary_data": False}), outputs=wanted)
    assert list(outputs(answer)) == ["entropy", "prediction"]
    assert list(answer.json()) == ["model_name", "model_version", "outputs"]


TEXT = tensor("text", [1], ["a"])


@pytest.mark.parametrize(
    "more",
    [
        {"model_name": "another", "model_version": "7"},
        {"colour": {"nested": [1, 2]}},
        {"parameters": {"colour": 1, "content_type": "str", "headers": {"x": "y"}, "timeout": 5, "sequence_id": 3}},
        {"parameters": {"binary_data_output": True}},
        {"inputs": [TEXT | {"colour": 1, "parameters": {"content_type": "str", "binary_data": True}}]},
        {"outputs": [{"name": "prediction", "colour": 1, "parameters": {"binary_data": True, "classification": 2}}]},
        {"id": None, "parameters": None, "outputs": None},
    ],
)
def test_what_the_protocol_does_not_name_is_ignored(colours: TestClient, more: dict[str, Any]) -> None:
    answer = colours.post("/v2/models/colours/infer", json={"inputs": [TEXT]} | more)
    predicted = colours.post("/predict", json={"inputs": "a"}).json()["predictions"][0]
    assert outputs(answer)["prediction"]["data"] == [predicted["prediction"]]
    assert answer.json()["model_name"] == "colours"


def test_predict_still_refuses_what_it_does_not_know(colours: TestClient) -> None:
    response = colours.post("/predict", json={"inputs": "a", "model_name": "colours"})
    assert response.status_code == 422
    assert response.json()["detail"] == "model_name: Extra inputs are not permitted"


# What clients send, byte for byte: KServe's SDK 0.21 (`InferRequest.to_rest`), the client of MLServer 1.7 (`mlserver infer`,
# which uses Triton's) and MLServer's `StringCodec`. The clients themselves: tests/integration/serving/test_clients.py.
SENT = {
    "kserve": b'{"id":"mine","model_name":"colours","inputs":[{"name":"text","shape":[1],"datatype":"BYTES",'
    b'"data":["abc"]}]}',
    "kserve, more": b'{"id":"mine","model_name":"colours","inputs":[{"name":"text","shape":[1,1],"datatype":"BYTES",'
    b'"data":["abc"]}],"outputs":[{"name":"prediction"}],"parameters":{"num_samples":16,"trace":"x"}}',
    "mlserver": b'{"id": "mine", "inputs": [{"name": "text", "shape": [1, 1], "datatype": "BYTES", "data": ["abc"]}], '
    b'"parameters": {"binary_data_output": true}}',
    "mlserver, codec": b'{"id":"mine","parameters":{"content_type":"str"},"inputs":[{"name":"text","shape":[1,1],'
    b'"datatype":"BYTES","parameters":{"content_type":"str"},"data":["abc"]}]}',
}


@pytest.mark.parametrize("client", SENT)
def test_the_bytes_of_other_projects_clients_are_answered(colours: TestClient, client: str) -> None:
    headers = {"content-type": "application/json"}
    answer = colours.post("/v2/models/colours/infer", content=SENT[client], headers=headers)
    predicted = colours.post("/predict", json={"inputs": "abc"}).json()["predictions"][0]
    assert outputs(answer)["prediction"]["data"] == [predicted["prediction"]]
    assert answer.json()["id"] == "mine"


def test_binary_inputs_of_kserve_are_refused_with_the_remedy(colours: TestClient) -> None:
    """What its SDK sends after `set_data_from_numpy`, whose default is binary."""
    head = b'{"id":"mine","model_name":"colours","inputs":[{"name":"text","shape":[1],"datatype":"BYTES","parameters":'
    head += b'{"binary_data_size":7}}]}'
    headers = {"content-type": "application/octet-stream", "inference-header-content-length": str(len(head))}
    answer = colours.post("/v2/models/colours/infer", content=head + b"\x03\x00\x00\x00abc", headers=headers)
    assert answer.status_code == 415
    remedy = "with KServe's or Triton's client, pass binary_data=False to set_data_from_numpy"
    assert answer.json()["error"].endswith(remedy)


@pytest.mark.parametrize(
    ("inputs", "more", "said"),
    [
        ([], {}, "inputs: "),
        ([tensor("words", [1], ["a"])], {}, "inputs.0.name: Input should be 'text' or 'choices'"),
        ([tensor("choices", [2], ["a", "b"])], {}, "inputs: the tensor 'text' is missing"),
        ([TEXT, TEXT], {}, "inputs: 'text' appears twice"),
        ([tensor("text", [1], [1.5], "FP32")], {}, "inputs.0.datatype: Input should be 'BYTES'"),
        ([tensor("text", [1], [7])], {}, "inputs.0.data.0: Input should be a valid string"),
        ([tensor("text", [1], [[["a"]]])], {}, "inputs.0.data.0"),
        ([tensor("text", [2], ["a"])], {}, "text: shape [2] means 2 elements, but data has 1"),
        ([tensor("text", [1, 2], ["a", "b"])], {}, "text: shape [1, 2] is not allowed; use [N] or [N, 1]"),
        ([tensor("text", [], ["a"])], {}, "inputs.0.shape"),
        ([tensor("text", [-1], ["a"])], {}, "inputs.0.shape.0"),
        ([tensor("text", [0], [])], {}, "inputs.0.shape.0: Input should be greater than or equal to 1"),
        ([{"name": "text", "shape": [1], "datatype": "BYTES"}], {}, "text: shape [1] means 1 elements, but data has 0"),
        ([tensor("text", [1], [""])], {}, "inputs: the text is empty"),
        ([TEXT], {"outputs": [{"name": "logits"}]}, "outputs.0.name: Input should be 'prediction', 'index'"),
        ([TEXT], {"outputs": [{"name": "index"}, {"name": "index"}]}, "outputs.1: the output 'index' is requested twice"),
        ([TEXT], {"parameters": {"num_samples": "many"}}, "num_samples: Input should be a valid integer"),
        ([TEXT], {"parameters": {"num_samples": 10_000}}, "num_samples: 10000 is above this server's limit"),
        ([TEXT], {"parameters": {"choices": "{"}}, "parameters: choices is not valid JSON; send a JSON list"),
        ([TEXT], {"parameters": {"choices": "[1, 2]"}}, "choices"),
        ([TEXT, tensor("choices", [2], ["a", "b"])], {}, "choices: 'a' is not a choice of this adapter"),
        ([TEXT], {"id": "\ud800"}, "id: the text is not valid Unicode"),
        ([tensor("text", [1], ["a"], parameters={"binary_data_size": 5})], {}, "text: this server reads JSON tensors only"),
        ([TEXT], {"parameters": ["num_samples"]}, "parameters: "),
    ],
)
def test_a_wrong_request_is_refused_in_the_protocols_form(
    colours: TestClient, inputs: list[dict[str, Any]], more: dict[str, Any], said: str
) -> None:
    response = infer(colours, *inputs, **more)
    assert response.status_code == 422, response.text
    assert list(response.json()) == ["error"]
    assert said in response.json()["error"]


def test_every_error_below_v2_has_the_protocols_form(colours: TestClient) -> None:
    body = {"inputs": [TEXT]}
    binary = {"inference-header-content-length": "10", "content-type": "application/octet-stream"}
    for response, status, said in (
        (infer(colours, TEXT, model="other"), 404, "adapter: 'other' is not loaded"),
        (colours.get("/v2/models/other/ready"), 404, "is not loaded"),
        (colours.get("/v2/models/colours/versions/2"), 404, "has no version '2'"),
        (colours.get("/v2/models/..%2f..%2fetc%2fpasswd"), 404, "is not a route"),
        (colours.get("/v2/nowhere"), 404, "is not a route"),
        (colours.get("/v2/models/colours/infer"), 405, "supports only POST"),
        (colours.post("/v2/models/colours/infer", content=b"{}x", headers=binary), 415, "binary-data extension"),
        (
            colours.post("/v2/models/colours/infer", json=body, headers={"inference-header-content-length": "10"}),
            415,
            "binary-data extension",
        ),
        (colours.post("/v2/models/colours/infer", content=b"x" * 3_000_000), 413, "the limit is 2000000"),
        (infer(colours, tensor("text", [1], ["a" * 130])), 413, "the limit is 120"),
    ):
        assert response.status_code == status, response.text
        assert response.headers["content-type"] == "application/json"
        assert list(response.json()) == ["error"]
        assert said in response.json()["error"]


def test_infer_is_counted_like_predict(colours: TestClient) -> None:
    def count() -> float:
        lines = colours.get("/metrics").text.splitlines()
        found = [line for line in lines if line.startswith('scalabl_predictions_total{adapter="colours"}')]
        return float(found[0].split()[1]) if found else 0.0

    before = count()
    infer(colours, tensor("text", [3], ["a", "b", "c"]))
    assert count() == before + 3
