"""Every refused request gets a problem document with its `type`, and a detail that says what to change."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from scalabl_server.app import create_app
from scalabl_server.engines.interface import Engine
from scalabl_server.engines.load import load_engine
from scalabl_server.settings import ServeSettings

from scalabl.errors import AdapterError
from tests.server.conftest import Gate, settings_for, wait_until


def refused(response: httpx.Response, status: int, slug: str, *details: str) -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert set(problem) == {"type", "title", "status", "detail"}
    assert (problem["type"], problem["status"]) == (f"urn:scalabl:problem:{slug}", status)
    for detail in details:
        assert detail in problem["detail"], problem["detail"]


def ask(client: TestClient, **body: Any) -> httpx.Response:
    return client.post("/predict", json=body)


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ({}, "inputs: Field required"),
        ({"inputs": 3}, "inputs: Input should be a valid string or Input should be a valid list"),
        ({"inputs": []}, "inputs: "),
        ({"inputs": ["a", 3]}, "inputs.1: Input should be a valid string"),
        ({"inputs": ""}, "inputs: the text is empty; send at least one visible character"),
        ({"inputs": " \n\t"}, "inputs: the text is empty"),
        ({"inputs": ["a", ""]}, "inputs.1: the text is empty"),
        ({"inputs": None}, "inputs: "),
        ({"inputs": "a", "text": "b"}, "text: Extra inputs are not permitted"),
        ({"inputs": "a", "num_samples": 0}, "num_samples: Input should be greater than or equal to 1"),
        ({"inputs": "a", "num_samples": 1.5}, "num_samples: Input should be a valid integer"),
        ({"inputs": "a", "num_samples": "8"}, "num_samples: Input should be a valid integer"),
        ({"inputs": "a", "num_samples": 257}, "num_samples: 257 is above this server's limit of 256"),
        ({"inputs": "a", "seed": -1}, "seed: Input should be greater than or equal to 0"),
        ({"inputs": "a", "seed": 2**63}, "seed: Input should be less than 9223372036854775808"),
        ({"inputs": "a", "method": "magic"}, "method: Input should be 'monte_carlo'"),
        ({"inputs": "a", "return_samples": 7}, "return_samples: Input should be a valid boolean"),
        (
            {"inputs": "a", "choices": ["red", "b"]},
            "choices: 'b' is not a choice of this adapter",
        ),
        ({"inputs": "a", "choices": ["red", "red"]}, "choices: 'red' appears twice"),
        ({"inputs": ["a", "b"], "choices": [["red", "blue"], ["red", "c"]]}, "choices.1: 'c' is not a choice"),
    ],
)
def test_a_wrong_field_is_named(colours: TestClient, body: dict[str, Any], detail: str) -> None:
    refused(ask(colours, **body), 422, "invalid-field", detail)


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ({}, "choices: this adapter's task is multiple_choice; send the choices of the inputs"),
        ({"choices": ["a"]}, "choices: "),
        ({"choices": []}, "choices: "),
        ({"choices": ["a", "b", "a"]}, "choices: 'a' appears twice; choices must be distinct"),
        ({"choices": list("abcde")}, "choices: the number of choices is 5; send 2 to 4"),
        ({"choices": ["a", ""]}, "choices: the text is empty"),
        ({"choices": [["a", "b"], ["c", "d"]]}, "choices: 2 lists of choices for 1 inputs"),
        ({"choices": [["a", "b"], "c"]}, "choices"),
        ({"choices": [["a"]]}, "choices"),
        ({"inputs": ["x", "y"], "choices": [["a", "b"], ["c", "c"]]}, "choices.1: 'c' appears twice"),
    ],
)
def test_wrong_choices_are_named(letters: TestClient, body: dict[str, Any], detail: str) -> None:
    refused(ask(letters, **{"inputs": "why"} | body), 422, "invalid-field", detail)


@pytest.mark.parametrize(
    ("content", "detail"),
    [
        (b"{", "body: not valid JSON at character 1: Expecting property name"),
        (b"", "body: "),
        (b"[]", "body: send a JSON object"),
        (b'"text"', "body: send a JSON object"),
        (b'{"inputs": "\xff"}', "body: not valid UTF-8 at byte 12"),
        (b'{"inputs": "\\ud800 a"}', "inputs: the text is not valid Unicode (a lone surrogate at character 0)"),
        (
            b'{"inputs": "a", "\\ud800": 1}',
            "body: a field's name is not valid Unicode (a lone surrogate at character 0)",
        ),
        (b"[" * 100_000, "body: nested more deeply than the limit of 64 levels"),
        (b'{"inputs": ' + b"[" * 64 + b"]" * 64 + b"}", "body: nested more deeply than the limit of 64 levels"),
        (b'{"inputs": "a", "inputs": "b"}', "body: the name 'inputs' appears twice in one object"),
        (b'{"inputs": "a", "seed": NaN}', "body: NaN is not JSON; send a finite number or null"),
        (b'{"inputs": "a", "seed": -Infinity}', "body: -Infinity is not JSON"),
        (b'{"inputs": "a", "num_samples": 1e999}', "num_samples: "),
        (b'{"inputs": "a", "seed": ' + b"9" * 5000 + b"}", "body: a number is too long"),
        (b'{"inputs": [' + b"1," * 100_000 + b"1]}", "inputs: "),
        ('{"inputs": "a"}'.encode("utf-16"), "body: not valid UTF-8 at byte 0"),
    ],
)
def test_a_body_that_is_no_request_is_refused(colours: TestClient, content: bytes, detail: str) -> None:
    response = colours.post("/predict", content=content, headers={"content-type": "application/json"})
    refused(response, 422, "invalid-field", detail)


def test_a_form_is_told_to_be_json(colours: TestClient) -> None:
    response = colours.post("/predict", data={"inputs": "a"})
    refused(response, 415, "unsupported-media-type", "'Content-Type: application/json'")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"content-type": "application/json; charset=UTF-8"}, 200),
        ({"content-type": "APPLICATION/vnd.me+json"}, 200),
        ({"content-type": "application/json;charset=UTF-8;"}, 200),
        ({"content-type": "application/json; charset=utf-8; odata=verbose"}, 200),
        ({"content-type": "application/json;odata.metadata=minimal;IEEE754Compatible=false;charset=utf-8"}, 200),
        ({"content-type": 'application/json ; profile="a; charset=latin-1" ; Charset = "UTF-8"'}, 200),
        ({"content-type": "application/json;; charset='utf-8'"}, 200),
        ({"content-type": "application/json; charset=latin-1"}, 415),
        ({"content-type": "application/json; version=1; charset=latin-1"}, 415),
        ({"content-type": "application/json; charset=utf-8; charset=utf-16"}, 415),
        ({"content-type": "application/json; charset="}, 415),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": ""}, 415),
        ({"content-type": "application/json", "content-encoding": "gzip"}, 415),
    ],
)
def test_a_body_is_json_as_it_is(colours: TestClient, headers: dict[str, str], status: int) -> None:
    response = colours.post("/predict", content=b'{"inputs": "a"}', headers=headers)
    if status == 200:
        assert response.status_code == 200
    else:
        refused(response, status, "unsupported-media-type", "send ")


def test_a_charset_other_than_utf_8_is_named(colours: TestClient) -> None:
    headers = {"content-type": "application/json; odata=verbose; charset=windows-1252"}
    response = colours.post("/predict", content=b'{"inputs": "a"}', headers=headers)
    refused(response, 415, "unsupported-media-type", "the charset is 'windows-1252'; send the JSON in UTF-8")


def test_a_byte_order_mark_before_the_json_is_ignored(colours: TestClient) -> None:
    headers = {"content-type": "application/json"}
    response = colours.post("/predict", content=b'\xef\xbb\xbf{"inputs": "a"}', headers=headers)
    assert response.status_code == 200, response.text
    twice = colours.post("/predict", content=2 * b"\xef\xbb\xbf" + b'{"inputs": "a"}', headers=headers)
    refused(twice, 422, "invalid-field", "body: not valid JSON at character 0")


def test_a_detail_that_quotes_the_request_is_short(colours: TestClient) -> None:
    assert len(ask(colours, inputs="a", adapter="x" * 100_000).json()["detail"]) < 2100
    assert len(ask(colours, inputs="a", **{f"{n:0500}": 1 for n in range(1000)}).json()["detail"]) < 2100


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
fields = st.sampled_from(["inputs", "choices", "num_samples", "seed", "method", "return_samples", "truncate", "adapter"])


@given(json_values | st.dictionaries(fields, json_values, max_size=4))
def test_no_json_makes_a_server_error(colours: TestClient, body: Any) -> None:
    response = colours.post("/predict", content=json.dumps(body), headers={"content-type": "application/json"})
    assert response.status_code in (200, 404, 413, 422)
    if response.status_code != 200:
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["detail"]


def test_an_adapter_that_is_not_loaded_is_never_replaced(colours: TestClient) -> None:
    detail = "adapter: 'other' is not loaded; this server has 'colours'"
    refused(ask(colours, inputs="a", adapter="other"), 404, "unknown-adapter", detail)


def test_unknown_routes_and_methods(colours: TestClient) -> None:
    refused(colours.get("/nowhere"), 404, "not-found", "/nowhere is not a route of this server; see /docs")
    response = colours.get("/predict")
    refused(response, 405, "method-not-allowed", "/predict supports only POST")
    assert response.headers["allow"] == "POST"


def test_a_body_above_the_limit_is_refused_by_its_declared_length(serve: Callable[..., TestClient]) -> None:
    client = serve(max_body_bytes=200)
    assert ask(client, inputs="a").status_code == 200
    response = ask(client, inputs="a" * 300)
    refused(response, 413, "body-too-large", "the limit is 200", "send fewer inputs")


def test_a_body_without_a_length_is_cut_off_at_the_limit(serve: Callable[..., TestClient]) -> None:
    client = serve(max_body_bytes=200)
    read = 0

    def chunks() -> Iterator[bytes]:
        nonlocal read
        yield b'{"inputs": "'
        for _ in range(1000):
            read += 1
            yield b"a" * 50

    headers = {"content-type": "application/json"}
    refused(client.post("/predict", content=chunks(), headers=headers), 413, "body-too-large", "the limit is 200")


def test_an_input_that_is_too_long_is_refused_with_size_and_limit(colours: TestClient) -> None:
    details = ("inputs: the prompt has 138 tokens and the limit is 120", "truncate: true")
    refused(ask(colours, inputs="a" * 130), 413, "input-too-large", *details)
    refused(ask(colours, inputs=["a", "a" * 130]), 413, "input-too-large", "inputs.1: the prompt has 138 tokens")


def test_an_input_that_no_pass_can_hold_is_refused_at_once(serve: Callable[..., TestClient]) -> None:
    client = serve(max_batch_tokens=100)
    details = ("inputs: 11 tokens x 10 samples = 110, above the limit of 100", "lower num_samples")
    refused(ask(client, inputs="abc", num_samples=10), 413, "input-too-large", *details)
    assert ask(client, inputs="abc", num_samples=9).status_code == 200


def test_too_many_inputs_are_refused(serve: Callable[..., TestClient]) -> None:
    details = ("inputs: 4 texts exceed the limit of 3 per request",)
    refused(ask(serve(max_inputs=3), inputs=["a"] * 4), 413, "input-too-large", *details)


@pytest.mark.parametrize(
    ("headers", "detail"),
    [
        ({}, "send a key as 'Authorization: Bearer <key>' or 'X-API-Key: <key>'"),
        ({"authorization": "Bearer wrong"}, "this server does not know the API key; send a valid one"),
        ({"x-api-key": "two "}, None),
        ({"authorization": "Basic b25l"}, "send a key"),
        ({"authorization": "Bearer "}, "send a key"),
        ({"authorization": "Bearer one"}, None),
        ({"authorization": "bearer two"}, None),
        ({"x-api-key": "wrong"}, "this server does not know the API key"),
    ],
)
def test_a_key_is_needed_where_keys_are_set(keyed: TestClient, headers: dict[str, str], detail: str | None) -> None:
    for response in (keyed.post("/predict", json={"inputs": "a"}, headers=headers), keyed.get("/info", headers=headers)):
        if detail is None:
            assert response.status_code == 200
        else:
            refused(response, 401, "unauthorized", detail)
            assert response.headers["www-authenticate"] == "Bearer"


@pytest.fixture
def keyed(serve: Callable[..., TestClient]) -> TestClient:
    return serve(api_keys="one, two")


def test_health_and_metrics_need_no_key(keyed: TestClient) -> None:
    for path in ("/health/live", "/health/ready", "/metrics"):
        assert keyed.get(path).status_code == 200


def test_a_full_queue_is_refused_at_once_with_a_time_to_come_back(serve: Callable[..., TestClient], gate: Gate) -> None:
    client = serve(load=gate.load, max_queue=2)
    with ThreadPoolExecutor(3) as pool:
        running = pool.submit(ask, client, inputs="a")
        assert gate.entered.wait(30)
        waiting = pool.submit(ask, client, inputs=["b", "c"])
        wait_until(lambda: "scalabl_queue_inputs 2.0" in client.get("/metrics").text)
        response = ask(client, inputs="d")
        refused(response, 429, "queue-full", "2 inputs wait and the queue is limited to 2; this request has 1")
        assert int(response.headers["retry-after"]) >= 1
        gate.open.set()
        assert running.result().status_code == waiting.result().status_code == 200
    assert ask(client, inputs="d").status_code == 200


def test_a_deadline_that_passes_is_said_and_the_work_dropped(serve: Callable[..., TestClient], gate: Gate) -> None:
    client = serve(load=gate.load, request_timeout=0.2)
    refused(
        ask(client, inputs="a"),
        504,
        "deadline-exceeded",
        "no answer within the deadline of 0.2 s; send fewer inputs or samples",
    )
    refused(ask(client, inputs="b"), 504, "deadline-exceeded")
    gate.open.set()
    wait_until(lambda: ask(client, inputs="c").status_code == 200)
    assert "scalabl_queue_inputs 0.0" in client.get("/metrics").text


def test_a_failing_pass_is_an_error_without_its_secrets_and_the_server_goes_on(
    serve: Callable[..., TestClient], gate: Gate
) -> None:
    client = serve(load=gate.load)
    gate.open.set()
    gate.broken.set()
    response = ask(client, inputs="a")
    refused(response, 500, "internal-error", "the server's log has the details")
    assert "secret" not in response.text
    assert "path" not in response.text
    gate.broken.clear()
    assert ask(client, inputs="a").status_code == 200


def test_while_the_model_loads_the_server_is_live_and_not_ready(folders: Path) -> None:
    may_load = threading.Event()

    def load(settings: ServeSettings) -> Engine:
        assert may_load.wait(30)
        return load_engine(settings)

    with TestClient(create_app(settings_for(folders), load=load)) as client:
        assert client.get("/health/live").json() == {"status": "ok"}
        refused(client.get("/health/ready"), 503, "starting", "the model is being loaded")
        refused(client.get("/info"), 503, "starting")
        response = ask(client, inputs="a")
        refused(response, 503, "starting", "wait until /health/ready returns 200")
        assert int(response.headers["retry-after"]) >= 1
        assert "scalabl_ready 0.0" in client.get("/metrics").text
        may_load.set()
        wait_until(lambda: client.get("/health/ready").status_code == 200)
        assert ask(client, inputs="a").status_code == 200
        assert "scalabl_ready 1.0" in client.get("/metrics").text


def test_while_draining_running_work_is_answered_and_new_work_refused(serve: Callable[..., TestClient], gate: Gate) -> None:
    client = serve(load=gate.load)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(ask, client, inputs=["a", "b"])
        assert gate.entered.wait(30)
        client.app.state.lifetime.drain()  # type: ignore[attr-defined]  # the TestClient's app is typed as any ASGI app
        refused(ask(client, inputs="c"), 503, "draining", "the server is shutting down; try another replica")
        refused(client.get("/health/ready"), 503, "draining")
        assert client.get("/health/live").status_code == 200
        gate.open.set()
        assert running.result().status_code == 200


def test_a_model_that_cannot_be_loaded_is_reported(tmp_path: Path, folders: Path) -> None:
    failures: list[Exception] = []
    settings = settings_for(folders, adapter=str(tmp_path))
    with TestClient(create_app(settings, on_failure=failures.append)) as client:
        wait_until(lambda: bool(failures))
        for path in ("/health/live", "/health/ready", "/info"):
            refused(client.get(path), 503, "failed", "could not be loaded; see the server's log for the reason")
        refused(ask(client, inputs="a"), 503, "failed")
    assert isinstance(failures[0], AdapterError)


def test_an_adapter_of_another_tokenizer_is_refused(folders: Path, tmp_path: Path) -> None:
    source = folders / "colours"
    config = json.loads((source / "adapter_config.json").read_text())
    config["task"]["choice_tokens"][1] += 1
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes((source / "adapter_model.safetensors").read_bytes())
    with pytest.raises(
        AdapterError, match=r"trained with another token for the choice 'green'.*serve it with the base model"
    ):
        load_engine(settings_for(folders, adapter=str(tmp_path)))
