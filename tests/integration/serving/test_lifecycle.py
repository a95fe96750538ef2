"""Start, faults and shutdown of real server processes under traffic, as operator and clients see them."""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.processes.port import free_port
from tests import tiny
from tests.integration.support import storm
from tests.integration.support.process import Served, served, write_models

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = write_models(tmp_path_factory.mktemp("life"))
    tiny.write_adapter(models / "root" / "good", posterior_scale=0.5)
    shutil.copytree(models / "root" / "good", models / "root" / "corrupt")
    weights = models / "root" / "corrupt" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return models


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[..., Served]]:
    contexts = []

    def started(**settings: Any) -> Served:
        context = served(folder, module="tests.integration.support.faulty", **settings)
        contexts.append(context)
        return context.__enter__()

    yield started
    for context in contexts:
        context.__exit__(None, None, None)


def ask(server: Served, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/predict", json=body, timeout=60)


def get(server: Served, path: str) -> httpx.Response:
    return httpx.get(f"{server.url}{path}", timeout=10)


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> float:
    started = time.monotonic()
    while not condition():
        assert time.monotonic() < started + seconds, "the condition never came true"
        time.sleep(0.01)
    return time.monotonic() - started


def probabilities(response: httpx.Response) -> list[float]:
    assert response.status_code == 200, response.text
    return list(response.json()["predictions"][0]["probabilities"].values())


SLOW = {"inputs": "a" * 100}


def test_sigterm_under_load_answers_every_accepted_request_and_exits_with_0(start: Callable[..., Served]) -> None:
    server = start(num_samples=16, max_queue=2000, prefix_cache_bytes=0)  # else the same prompt again costs next to nothing

    async def scenario() -> tuple[list[storm.Answer], float]:
        load = asyncio.create_task(storm.open_loop(server.port, 100, 4, lambda _: SLOW))
        await asyncio.sleep(2)
        server.process.send_signal(signal.SIGTERM)
        told = time.monotonic()
        return await load, told

    answers, told = asyncio.run(scenario())
    assert server.process.wait(60) == 0
    before = [answer for answer in answers if answer.began < told - 0.05]
    assert len(before) > 60
    assert {answer.status for answer in before} <= {200, 429}
    assert sum(answer.status == 200 and answer.ended > told for answer in before) > 3, (
        "some were running when the signal came"
    )
    after = [answer for answer in answers if answer.began > told + 0.05]
    refused = [answer for answer in after if answer.status == 503]
    assert {answer.status for answer in after} <= {503, None}
    for answer in refused:
        assert answer.problem == "draining"
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.headers["connection"] == "close"
    last = max(answer.ended for answer in before)
    assert all(answer.status == 503 for answer in after if answer.ended < last - 0.2), "it listens until all is answered"
    accepted = sum(answer.status == 200 for answer in before)
    print(f"{accepted} accepted, all answered; {len(refused)} told that it drains; drained in {last - told:.2f} s")


def test_while_draining_it_is_live_and_not_ready_for_as_long_as_asked(start: Callable[..., Served]) -> None:
    server = start(drain_delay=1.5)
    assert get(server, "/health/ready").status_code == 200
    server.process.send_signal(signal.SIGTERM)
    took = wait_until(lambda: get(server, "/health/ready").status_code == 503)
    assert took < 0.5
    assert get(server, "/health/live").status_code == 200
    assert ask(server, inputs="a").status_code == 503
    started = time.monotonic()
    assert server.process.wait(30) == 0
    assert time.monotonic() - started > 0.8


def test_a_second_sigterm_ends_it_at_once(start: Callable[..., Served]) -> None:
    server = start(shutdown_timeout=60)
    with ThreadPoolExecutor(1) as pool:
        stuck = pool.submit(httpx.post, f"{server.url}/predict", json={"inputs": "!stuck!"}, timeout=60)
        wait_until(lambda: 'scalabl_stage_duration_seconds_count{stage="queue"} 1.0' in get(server, "/metrics").text)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: get(server, "/health/ready").status_code == 503)
        assert server.process.poll() is None
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 128 + signal.SIGTERM
        assert time.monotonic() - started < 1
        with pytest.raises(httpx.TransportError):
            stuck.result()


def test_when_the_grace_period_ends_whoever_waits_is_told_and_the_status_says_so(start: Callable[..., Served]) -> None:
    server = start(shutdown_timeout=1)
    with ThreadPoolExecutor(2) as pool:
        stuck = [pool.submit(ask, server, inputs="!stuck!")]
        wait_until(lambda: 'scalabl_stage_duration_seconds_count{stage="queue"}' in get(server, "/metrics").text)
        stuck.append(pool.submit(ask, server, inputs="a"))
        wait_until(lambda: "scalabl_queue_inputs 1.0" in get(server, "/metrics").text)
        server.process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert server.process.wait(30) == 1
        assert time.monotonic() - started < 5
        for future in stuck:
            assert (future.result().status_code, future.result().json()["type"]) == (503, "urn:scalabl:problem:draining")


def test_a_signal_while_the_model_loads_ends_it(folder: Path) -> None:
    import subprocess
    import sys

    port = free_port()
    arguments = ["--model", folder / "base", "--adapter", folder / "colours", "--port", port, "--device", "cpu"]
    process = subprocess.Popen(
        [sys.executable, "-m", "scalabl_server.cli", "serve", *map(str, arguments)], stderr=subprocess.PIPE
    )
    try:

        def listening() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        wait_until(listening, 60)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
        assert process.returncode == 0
    finally:
        process.kill()
        process.wait()


def _next_good_request_is_right(server: Served, expected: list[float]) -> None:
    assert probabilities(ask(server, inputs="a text")) == pytest.approx(expected, abs=1e-5)
    assert get(server, "/health/ready").status_code == get(server, "/health/live").status_code == 200


@pytest.mark.parametrize(
    ("fault", "status", "slug"), [("exception", 500, "internal-error"), ("out of memory", 503, "out-of-memory")]
)
def test_a_fault_in_a_pass_reaches_only_the_input_that_causes_it(
    start: Callable[..., Served], fault: str, status: int, slug: str
) -> None:
    server = start(target_batch_tokens=16384)
    expected = probabilities(ask(server, inputs="a text"))

    async def storm_with_one_culprit() -> list[storm.Answer]:
        texts = ["a text"] * 20 + [f"!{fault}!"] + ["a text"] * 20
        return list(await asyncio.gather(*(storm.post(server.port, {"inputs": text}) for text in texts)))

    for _ in range(3):
        answers = asyncio.run(storm_with_one_culprit())
        culprit = answers.pop(20)
        assert (culprit.status, culprit.problem) == (status, slug)
        assert b"secret" not in culprit.body
        assert b"Traceback" not in culprit.body
        for answer in answers:
            assert answer.status == 200, answer.body
            (prediction,) = json.loads(answer.body)["predictions"]
            assert list(prediction["probabilities"].values()) == pytest.approx(expected, abs=1e-5)
    metrics = get(server, "/metrics").text
    for kind, counts in (("error", fault == "exception"), ("out-of-memory", fault != "exception"), ("device", False)):
        assert (f'scalabl_failed_passes_total{{kind="{kind}"}} 0.0' not in metrics) == counts
    _next_good_request_is_right(server, expected)


def test_a_stuck_worker_fails_liveness_with_the_reason(start: Callable[..., Served]) -> None:
    server = start(worker_timeout=1, request_timeout=2)
    with ThreadPoolExecutor(1) as pool:
        stuck = pool.submit(ask, server, inputs="!stuck!")
        took = wait_until(lambda: get(server, "/health/live").status_code == 503)
        assert 0.9 < took < 3
        response = get(server, "/health/live")
        assert response.json()["type"] == "urn:scalabl:problem:stuck"
        assert "above the limit of 1 s: the worker is stuck; restart the server" in response.json()["detail"]
        assert get(server, "/health/ready").status_code == 503
        assert "scalabl_ready 0.0" in get(server, "/metrics").text
        assert stuck.result().status_code == 504
    assert server.stop() == 0, "nobody is waiting any more, and the thread does not keep the process"


def test_a_dead_worker_fails_liveness_with_the_reason(start: Callable[..., Served]) -> None:
    server = start(request_timeout=2)
    with ThreadPoolExecutor(1) as pool:
        dead = pool.submit(ask, server, inputs="!dead!")
        wait_until(lambda: get(server, "/health/live").status_code == 503)
        assert "the batching loop has crashed; restart the server" in get(server, "/health/live").json()["detail"]
        assert dead.result().status_code in (500, 503, 504)
    assert server.stop() == 0


def test_a_corrupt_adapter_is_refused_while_the_server_answers(start: Callable[..., Served], folder: Path) -> None:
    server = start(enable_adapter_loading=True, adapter_root=folder / "root")
    expected = probabilities(ask(server, inputs="a text"))

    def load(name: str, path: str, replace: bool = False) -> httpx.Response:
        body = {"lora_name": name, "lora_path": path, "replace": replace}
        return httpx.post(f"{server.url}/v1/load_lora_adapter", json=body, timeout=60)

    with ThreadPoolExecutor(4) as pool:
        traffic = [pool.submit(ask, server, inputs="a text") for _ in range(60)]
        for _ in range(5):
            response = load("colours", "corrupt", replace=True)
            assert (response.status_code, response.json()["type"]) == (422, "urn:scalabl:problem:invalid-adapter")
            assert str(folder) not in response.text
        for future in traffic:
            assert probabilities(future.result()) == pytest.approx(expected, abs=1e-5)
    _next_good_request_is_right(server, expected)
    assert load("good", "good").status_code == 200
    assert probabilities(ask(server, inputs="a text", adapter="good")) != pytest.approx(expected, abs=1e-5)
    _next_good_request_is_right(server, expected)


def test_slow_clients_hold_nobody_up(start: Callable[..., Served]) -> None:
    server = start()
    expected = probabilities(ask(server, inputs="a text"))
    content = json.dumps({"inputs": "a text"}).encode()
    head = f"POST /predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    request = head.encode() + content
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(50)]
    for position, byte in enumerate(request):
        for connection in slow:
            connection.sendall(bytes([byte]))
        if position % 20 == 0:
            started = time.monotonic()
            _next_good_request_is_right(server, expected)
            assert time.monotonic() - started < 2
    for connection in slow:
        connection.settimeout(30)
        assert connection.recv(100).startswith(b"HTTP/1.1 200 ")
        connection.close()
    _next_good_request_is_right(server, expected)
