"""Each limit with its flag, deadlines, and refusals that are sent at once even while all threads are busy."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient
from scalabl_server.lifetime import ServerLifetime

from tests.server.conftest import Gate, model_of, wait_until
from tests.server.web.test_refusals import ask, refused


def lifetime_of(client: TestClient) -> ServerLifetime:
    server = client.app.state.lifetime  # type: ignore[attr-defined]  # the TestClient's app is typed as any ASGI app
    assert isinstance(server, ServerLifetime)
    return server


@pytest.mark.parametrize(
    ("setting", "body", "status", "slug", "detail"),
    [
        (
            {"max_input_chars": 10},
            {"inputs": ["b", "a" * 11]},
            413,
            "input-too-large",
            "inputs.1: 11 characters exceed the limit of 10; shorten the input or set truncate to true",
        ),
        (
            {"max_sample_values": 24},
            {"inputs": ["a", "b"], "num_samples": 5, "return_samples": True},
            413,
            "input-too-large",
            "return_samples: 30 probabilities (inputs x samples x choices) exceed the limit of 24",
        ),
        (
            {"max_queue_tokens": 100},
            {"inputs": "a" * 30, "num_samples": 10},
            413,
            "input-too-large",
            "never fit in the queue of 100 tokens",
        ),
        ({"max_queue": 2}, {"inputs": ["a"] * 3}, 413, "input-too-large", "3 inputs never fit in the queue of 2 inputs"),
    ],
)
def test_a_request_above_a_limit_is_refused_with_value_and_limit(
    serve: Callable[..., TestClient], setting: dict[str, int], body: dict[str, Any], status: int, slug: str, detail: str
) -> None:
    client = serve(**setting)
    refused(ask(client, **body), status, slug, detail)
    assert ask(client, inputs="a", num_samples=4, return_samples=True).status_code == 200


@pytest.mark.parametrize(
    ("setting", "choices", "detail"),
    [
        ({"max_choices": 3}, ["a", "b", "c", "d"], "choices: 4 choices exceed the limit of 3"),
        ({"max_choices": 3}, [["a", "b"], ["a", "b", "c", "d"]], "choices.1: 4 choices exceed the limit of 3"),
        ({"max_choice_chars": 5}, ["a", "b" * 6], "choices: a choice of 6 characters exceeds the limit of 5"),
    ],
)
def test_choices_above_a_limit_are_refused(
    serve: Callable[..., TestClient], setting: dict[str, int], choices: Any, detail: str
) -> None:
    inputs = ["x", "y"] if isinstance(choices[0], list) else "x"
    refused(ask(serve("letters", **setting), inputs=inputs, choices=choices), 422, "invalid-field", detail)


def test_a_text_above_the_limit_is_cut_when_that_is_asked_for(serve: Callable[..., TestClient]) -> None:
    client = serve(max_input_chars=10)
    cut = ask(client, inputs="abcdefghijKLM", truncate=True).json()["predictions"][0]
    assert cut["probabilities"] == ask(client, inputs="abcdefghij").json()["predictions"][0]["probabilities"]


def test_the_limits_are_shown(serve: Callable[..., TestClient]) -> None:
    limits = serve(max_batch_tokens=100, max_choices=7).get("/info").json()["limits"]
    assert limits["max_queue_tokens"] == 6400
    assert limits["max_input_chars"] == 16 * 120
    assert limits["max_choices"] == 7


def test_a_request_may_have_a_shorter_deadline_and_not_a_longer_one(serve: Callable[..., TestClient], gate: Gate) -> None:
    client = serve(load=gate.load, request_timeout=0.3)
    for header, told in (("0.1", "0.1"), ("9", "0.3")):
        response = client.post("/predict", json={"inputs": "a"}, headers={"x-request-timeout": header})
        refused(response, 504, "deadline-exceeded", f"no answer within the deadline of {told} s")


@pytest.mark.parametrize("header", ["0", "-1", "nan", "inf", "soon", ""])
def test_a_deadline_that_is_no_time_is_refused(colours: TestClient, header: str) -> None:
    response = colours.post("/predict", json={"inputs": "a"}, headers={"x-request-timeout": header})
    refused(response, 422, "invalid-field", "x-request-timeout: ")


def test_a_deadline_that_has_passed_frees_the_place(serve: Callable[..., TestClient], gate: Gate) -> None:
    client = serve(load=gate.load, request_timeout=0.1)
    with ThreadPoolExecutor(4) as pool:
        for response in pool.map(lambda _: ask(client, inputs=["a", "b"]), range(4)):
            refused(response, 504, "deadline-exceeded")
    admission = lifetime_of(client).admission
    assert (admission.inputs, admission.tokens) == (0, 0)


@pytest.mark.parametrize(
    ("settings", "inputs", "more", "detail"),
    [
        ({"max_queue": 2}, ["b", "c"], "d", "2 inputs wait and the queue is limited to 2; this request has 1"),
        ({"max_queue_tokens": 1800}, "b" * 100, ["d" * 100] * 4, "416 tokens (inputs x samples x length) wait"),
    ],
    ids=["inputs", "tokens"],
)
def test_a_full_queue_answers_at_once_while_every_thread_is_busy(
    serve: Callable[..., TestClient], gate: Gate, settings: dict[str, int], inputs: Any, more: Any, detail: str
) -> None:
    client, held = serve(load=gate.load, **settings), threading.Event()
    server = lifetime_of(client)
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(ask, client, inputs="a")
        assert gate.entered.wait(30)
        wait_until(lambda: server.admission.inputs == 0)  # the loop knows of the pass
        server._prompt_thread.submit(held.wait, 30)
        waiting = pool.submit(ask, client, inputs=inputs)
        wait_until(lambda: server.admission.inputs > 0)
        started = time.perf_counter()
        response = ask(client, inputs=more)
        took = time.perf_counter() - started
        assert not waiting.done()
        held.set()
        gate.open.set()
        assert running.result().status_code == waiting.result().status_code == 200
    refused(response, 429, "queue-full", detail)
    assert int(response.headers["retry-after"]) >= 1
    assert took < 0.5, "nothing was waited for"
    reason = "inputs" if "max_queue" in settings else "tokens"
    assert f'scalabl_rejected_requests_total{{reason="{reason}"}} 1.0' in client.get("/metrics").text


def test_a_large_request_does_not_hold_up_the_tokenising_of_others(serve: Callable[..., TestClient]) -> None:
    client = serve(max_input_tokens=500, max_batch_tokens=8000, num_samples=1)
    server, order = lifetime_of(client), []
    original = server._prompt_thread.submit

    def submit(function: Any, *arguments: Any) -> Any:
        order.append(len(arguments[1].texts))
        return original(function, *arguments)

    server._prompt_thread.submit = submit  # type: ignore[method-assign]
    assert ask(client, inputs=["a" * 400] * 200).status_code == 200
    assert order == [200] * 4, "20,000 characters at a time"


@pytest.mark.parametrize(
    ("limit", "priority", "detail"),
    [
        (10, 11, "priority: 11 is outside this server's range of -10 to 10"),
        (10, -11, "priority: -11 is outside this server's range of -10 to 10"),
        (0, 1, "priority: this server does not accept priorities; leave the field out"),
        (10, 2**63, "priority: Input should be less than"),
        (10, 1.5, "priority: Input should be a valid integer"),
    ],
)
def test_a_priority_outside_the_bound_is_refused(
    serve: Callable[..., TestClient], limit: int, priority: float, detail: str
) -> None:
    client = serve(max_priority=limit)
    refused(ask(client, inputs="a", priority=priority), 422, "invalid-field", detail)
    assert ask(client, inputs="a", priority=0).status_code == 200


def test_the_next_pass_is_for_who_has_the_lowest_priority(serve: Callable[..., TestClient], gate: Gate) -> None:
    client = serve(load=gate.load, target_batch_tokens=1)
    server = lifetime_of(client)
    path = "/v2/models/colours/infer"
    infer = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["c"]}], "parameters": {"priority": -1}}
    with ThreadPoolExecutor(3) as pool:
        running = pool.submit(ask, client, inputs="a")
        assert gate.entered.wait(30)
        wait_until(lambda: server.admission.inputs == 0)  # the loop knows of the pass
        first = pool.submit(ask, client, inputs="b")
        wait_until(lambda: server.admission.inputs == 1)
        urgent = pool.submit(client.post, path, json=infer)
        wait_until(lambda: server.admission.inputs == 2)
        batcher = server.serving().batcher
        wait_until(lambda: batcher._slot is not None and batcher._slot.inputs[0].place.priority == -1)
        gate.open.set()
        assert {each.result().status_code for each in (running, first, urgent)} == {200}


def test_logits_that_are_not_finite_are_no_answer(serve: Callable[..., TestClient]) -> None:
    client = serve()
    model_of(lifetime_of(client).serving().engine).adapted["lm_head"].lora_B.fill_(float("inf"))
    refused(ask(client, inputs="a"), 500, "internal-error", "logits that are not finite for inputs.0")
