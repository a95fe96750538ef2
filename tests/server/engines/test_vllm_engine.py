"""`--engine vllm`: it gives the numbers of the default engine; what it refuses; how failing vLLM servers are handled."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from scalabl_server.app import create_app
from scalabl_server.engines.vllm import pool as vllm_pool
from scalabl_server.settings import ServeSettings

from tests import tiny
from tests.server.conftest import serving, settings_for, wait_until
from tests.server.engines.lora_server import LoraServer
from tests.server.web.test_refusals import ask, refused

TEXTS = ["the grass after rain", "rose", "the sea at night"]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_pool, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(vllm_pool, "PAUSES", (0.02, 0.05))


@pytest.fixture
def start(folders: Path, tmp_path: Path) -> Iterator[Callable[..., TestClient]]:
    """Starts a gateway in front of some servers, which may or may not be running."""
    with ExitStack() as stack:

        def started(*servers: LoraServer, adapter: str = "colours", **changes: Any) -> TestClient:
            settings = behind(folders, tmp_path, *servers, adapter=adapter, **changes)
            return stack.enter_context(serving(settings))

        yield started


def behind(folders: Path, tmp_path: Path, *servers: LoraServer, adapter: str = "colours", **changes: Any) -> ServeSettings:
    fields = {"num_samples": 8, "engine": "vllm", "engine_url": ",".join(each.url for each in servers)}
    return settings_for(folders, adapter, **fields | {"engine_adapter_dir": tmp_path / "loras"} | changes)


@pytest.fixture
def server() -> Iterator[LoraServer]:
    with LoraServer().up() as made:
        yield made


@pytest.fixture(scope="module")
def gateway(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, LoraServer]]:
    """A gateway and its server, shared by tests that change neither."""
    with LoraServer().up() as server, serving(behind(folders, tmp_path_factory.mktemp("gateway"), server)) as client:
        yield client, server


def predictions(client: TestClient, **body: Any) -> list[dict[str, Any]]:
    response = ask(client, **body)
    assert response.status_code == 200, response.text
    return list(response.json()["predictions"])


def agree(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    for first, second in zip(one, other, strict=True):
        assert second["probabilities"] == pytest.approx(first["probabilities"], abs=1e-5)
        assert second["mutual_information"] == pytest.approx(first["mutual_information"], abs=1e-5)
        assert second["num_samples"] == first["num_samples"]


def metric(client: TestClient, name: str) -> float:
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(name)]
    assert lines, f"no {name}"
    return sum(float(line.rpartition(" ")[2]) for line in lines)


@pytest.mark.parametrize("body", [{}, {"num_samples": 3}, {"num_samples": "auto"}], ids=str)
def test_its_answers_are_those_of_the_default_engine(
    gateway: tuple[TestClient, LoraServer], serve: Callable[..., TestClient], body: dict[str, Any]
) -> None:
    theirs = serve(num_samples=8, max_samples=8)
    agree(predictions(theirs, inputs=TEXTS, **body), predictions(gateway[0], inputs=TEXTS, **body))


def test_multiple_choice_too(start: Callable[..., TestClient], letters: TestClient, server: LoraServer) -> None:
    body = {"inputs": ["why", "how"], "choices": [["red", "green"], ["one", "two", "three"]]}
    agree(predictions(letters, num_samples=8, **body), predictions(start(server, adapter="letters"), **body))


def test_inputs_share_a_call_for_each_sample(gateway: tuple[TestClient, LoraServer]) -> None:
    client, server = gateway
    server.calls.clear()
    predictions(client, inputs=TEXTS, num_samples=4)
    assert sorted(count for _, count in server.calls) == [3] * 4
    assert len({name for name, _ in server.calls}) == 4


def test_more_choices_than_one_call_may_name(
    gateway: tuple[TestClient, LoraServer], colours: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scalabl_server.engines.vllm.client.TOKENS_PER_CALL", 2)
    agree(predictions(colours, inputs=TEXTS, num_samples=8), predictions(gateway[0], inputs=TEXTS))


def test_calibration_applies(
    start: Callable[..., TestClient], serve: Callable[..., TestClient], server: LoraServer, tmp_path: Path
) -> None:
    tiny.write_adapter(tmp_path / "scaled", posterior_scale=0.5, temperature=1.7)
    changed = {"adapter": str(tmp_path / "scaled")}
    mine, theirs = start(server, **changed), serve(num_samples=8, **changed)
    agree(predictions(theirs, inputs=TEXTS), predictions(mine, inputs=TEXTS))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            {"method": "linearized"},
            "method: the method linearized needs gradients, which this server's engine (vLLM) does not provide",
        ),
        ({"method": "control_variate"}, "method: the method control_variate needs gradients"),
        ({"seed": 1}, "seed: this server's engine (vLLM) has only the samples of seed 0"),
        ({"num_samples": 9}, "num_samples: 9 is above this server's limit of 8"),
    ],
)
def test_what_it_cannot_do_is_refused(gateway: tuple[TestClient, LoraServer], body: dict[str, Any], message: str) -> None:
    refused(ask(gateway[0], inputs="rose", **body), 422, "invalid-field", message)


def test_without_hidden_states_nothing_is_said_of_novelty(
    start: Callable[..., TestClient], server: LoraServer, folders: Path, tmp_path: Path
) -> None:
    shutil.copytree(folders / "colours", tmp_path / "colours")
    tiny.add_novelty(tmp_path / "colours")
    client = start(server, adapter=str(tmp_path / "colours"))
    for prediction in predictions(client, inputs=TEXTS):
        assert (prediction["novelty"], prediction["abstain"], prediction["abstain_reason"]) == (None, None, [])
    (adapter,) = client.get("/info").json()["adapters"]
    assert adapter["novelty"] is None
    assert client.get("/v1/dashboard").json()["stored"]["novelty"] is None
    assert "scalabl_novelty_level{" not in client.get("/metrics").text


def test_two_gateways_before_one_server_agree(
    start: Callable[..., TestClient], gateway: tuple[TestClient, LoraServer]
) -> None:
    client, server = gateway
    agree(predictions(client, inputs=TEXTS), predictions(start(server), inputs=TEXTS))


def test_loras_that_were_exported_before_are_found_by_name(
    start: Callable[..., TestClient], colours: TestClient, tmp_path: Path
) -> None:
    with LoraServer(loads=False).up() as server:
        with LoraServer().up() as other:  # writes what is missing
            predictions(start(other), inputs="rose")
        for folder in (tmp_path / "loras").iterdir():
            server.load(folder.name, folder)
        shutil.rmtree(tmp_path / "loras")
        agree(predictions(colours, inputs=TEXTS, num_samples=8), predictions(start(server), inputs=TEXTS))
        assert not (tmp_path / "loras").exists()


def failure(settings: ServeSettings) -> str:
    """The error with which a gateway fails to start."""
    failures: list[Exception] = []
    with TestClient(create_app(settings, on_failure=failures.append)) as client:
        wait_until(lambda: bool(failures))
        refused(client.get("/health/ready"), 503, "failed")
    return str(failures[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"names_tokens": False}, "gives no log-probability of the token"),
        ({"loads": False}, "has no adapter scalabl-"),
        ({"leaves_out": frozenset({"lm_head"})}, "does not apply the adapter's change of lm_head"),
        ({"answers_as": "the-base"}, "it answered for 'the-base' instead of 'scalabl-"),
    ],
)
def test_a_server_that_would_answer_wrongly_is_refused_at_the_start(
    folders: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with LoraServer(**changes).up() as server:
        assert message in failure(behind(folders, tmp_path, server))


def test_without_a_server_it_waits_and_then_says_so(folders: Path, tmp_path: Path) -> None:
    server = LoraServer()
    said = failure(behind(folders, tmp_path, server, engine_start_timeout=0.2))
    assert f"no vLLM server could be used within 0.2 s: 127.0.0.1:{server.port}: it cannot be reached" in said


def test_a_server_with_another_base_model_is_left_out(
    start: Callable[..., TestClient], server: LoraServer, caplog: pytest.LogCaptureFixture
) -> None:
    client = start(server)
    expected = predictions(client, inputs=TEXTS)
    with LoraServer(seed=1).up() as other:
        both = start(server, other)
        first = predictions(both, inputs=TEXTS)
        wait_until(lambda: "it has another base model" in caplog.text)
        # Which of the two is right nobody can tell; but all answers come from the same one.
        for _ in range(4):
            agree(first, predictions(both, inputs=TEXTS))
        assert metric(both, "scalabl_engine_ready") == 1
    agree(expected, predictions(client, inputs=TEXTS))


def test_killed_under_load_it_gives_503s_and_recovers_with_the_same_answers(start: Callable[..., TestClient]) -> None:
    server = LoraServer()
    with ThreadPoolExecutor(4) as pool:
        with server.up():
            client = start(server)
            expected = predictions(client, inputs=TEXTS)
            storm = [pool.submit(ask, client, inputs=TEXTS) for _ in range(40)]
            wait_until(lambda: sum(each.done() for each in storm) > 3)
            server.gate.clear()
            server.calls.clear()
            wait_until(lambda: bool(server.calls))  # killed with calls in its hands
        answers = [each.result() for each in storm]
    assert {answer.status_code for answer in answers} == {200, 503}
    for answer in answers:
        if answer.status_code == 200:
            agree(expected, answer.json()["predictions"])
    wait_until(lambda: client.get("/health/ready").status_code == 503)
    response = ask(client, inputs=TEXTS)
    refused(response, 503, "engine-unavailable", f"no vLLM server can answer: 127.0.0.1:{server.port}: ")
    assert int(response.headers["retry-after"]) >= 1
    assert client.get("/health/live").status_code == 200, "a restart of the gateway would not help"
    for name in list(server.models):
        if name != "the-base":
            del server.models[name]  # it comes back empty
    with server.up():
        wait_until(lambda: client.get("/health/ready").status_code == 200)
        agree(expected, predictions(client, inputs=TEXTS))


def test_a_lora_that_is_gone_is_never_answered_by_the_base_model(start: Callable[..., TestClient]) -> None:
    server = LoraServer()
    with server.up():
        client = start(server)
        expected = predictions(client, inputs=TEXTS)
        lost = next(name for name in server.models if name.endswith("-3"))
        for _ in range(5):
            server.models.pop(lost, None)
            response = ask(client, inputs=TEXTS)
            if response.status_code == 200:
                agree(expected, response.json()["predictions"])
            else:
                refused(response, 503, "engine-unavailable", "does not exist")
            wait_until(lambda: lost in server.models and client.get("/health/ready").status_code == 200)


def test_a_second_server_takes_over_when_one_dies(start: Callable[..., TestClient], server: LoraServer) -> None:
    other = LoraServer()
    with other.up():
        client = start(server, other)
        wait_until(lambda: metric(client, "scalabl_engine_ready") == 2)
        expected = predictions(client, inputs=TEXTS)
        assert other.calls
    agree(expected, predictions(client, inputs=TEXTS))
    assert client.get("/health/ready").status_code == 200
    with other.up():
        wait_until(lambda: metric(client, "scalabl_engine_ready") == 2)


def test_a_slow_server_does_not_hold_up_the_rest(start: Callable[..., TestClient], server: LoraServer) -> None:
    with LoraServer().up() as other:
        client = start(server, other, engine_timeout=20)
        wait_until(lambda: metric(client, "scalabl_engine_ready") == 2)
        expected = predictions(client, inputs=TEXTS)
        other.gate.clear()
        agree(expected, predictions(client, inputs=TEXTS))
        assert metric(client, "scalabl_engine_second_calls_total") > 0
        before = metric(client, "scalabl_engine_second_calls_total")
        agree(expected, predictions(client, inputs=TEXTS))
        assert metric(client, "scalabl_engine_second_calls_total") == before, "it gets no calls meanwhile"


def test_an_adapter_loaded_at_run_time_is_loaded_by_the_servers(
    start: Callable[..., TestClient], letters: TestClient, server: LoraServer, folders: Path
) -> None:
    client = start(server, enable_adapter_loading=True, adapter_root=folders)
    body = {"lora_name": "more", "lora_path": "letters"}
    assert client.post("/v1/load_lora_adapter", json=body).status_code == 200
    question = {"inputs": ["why"], "choices": ["red", "green"]}
    agree(predictions(letters, num_samples=8, **question), predictions(client, adapter="more", **question))
    held = len(server.models)
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "more"}).status_code == 200
    assert len(server.models) < held


def test_what_waits_while_its_adapter_is_unloaded_is_told_so_and_no_server_is_blamed(
    start: Callable[..., TestClient], server: LoraServer, folders: Path
) -> None:
    client = start(server, enable_adapter_loading=True, adapter_root=folders, target_batch_tokens=1)
    assert client.post("/v1/load_lora_adapter", json={"lora_name": "more", "lora_path": "letters"}).status_code == 200
    question = {"inputs": "why", "choices": ["red", "green"], "adapter": "more"}
    server.calls.clear()
    server.gate.clear()
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(ask, client, **question) for _ in range(3)]
        wait_until(lambda: bool(server.calls))
        unloading = pool.submit(client.post, "/v1/unload_lora_adapter", json={"lora_name": "more"})
        wait_until(lambda: client.get("/info").json()["adapters"][-1]["name"] != "more")
        server.gate.set()
        assert unloading.result().status_code == 200
        for each in waiting:
            if each.result().status_code != 200:
                refused(each.result(), 404, "unknown-adapter")
    assert metric(client, "scalabl_engine_ready") == 1
    assert len(predictions(client, inputs="rose")) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"engine": "vllm"}, "--engine vllm and --engine-url need each other"),
        ({"engine_url": "http://a:1"}, "--engine vllm and --engine-url need each other"),
        ({"engine": "vllm", "engine_url": "a:1"}, "'a:1' is not a URL"),
        (
            {"engine": "vllm", "engine_url": "http://a:1", "quantization": "int8"},
            "--quantization cannot be used with --engine vllm",
        ),
    ],
)
def test_its_flags_belong_together(folders: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings_for(folders, **fields)
