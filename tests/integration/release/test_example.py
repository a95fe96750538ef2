"""The example as in the README: a real server process with the real model answers the README's questions."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[3]
IN_SCOPE, OUT_OF_SCOPE = "how do i move money to my savings account", "who painted the sistine chapel ceiling"


@pytest.fixture(scope="module")
def base() -> str:
    folder = os.environ.get("SCALABL_EXAMPLE_BASE")
    if folder is None:
        pytest.skip("SCALABL_EXAMPLE_BASE is not set; run `make integration`, which fetches the example's base model")
    return folder


def _start(base: str, *arguments: str) -> tuple[subprocess.Popen[bytes], str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("scalabl")), "serve", "--model", base, "--port", str(port)]
    command += ["--adapter", "examples/intent_router/adapter", "--adapter-name", "intent-router", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE), f"http://127.0.0.1:{port}"


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, process.stderr and process.stderr.read().decode()
        try:
            if httpx.get(f"{url}/health/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise AssertionError(f"not ready within {seconds} s")


@pytest.fixture(scope="module")
def client(base: str) -> Iterator[httpx.Client]:
    process, url = _start(base)
    try:
        _wait_until_ready(process, url)
        with httpx.Client(base_url=url, timeout=120) as client:
            yield client
    finally:
        process.kill()
        process.communicate()


def _predict(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post("/predict", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def test_an_in_scope_query_is_routed_with_little_doubt_and_an_out_of_scope_query_with_much(client: httpx.Client) -> None:
    inside, outside = _predict(client, inputs=[IN_SCOPE, OUT_OF_SCOPE])["predictions"]
    assert inside["prediction"] == "banking"
    assert inside["confidence"] > 0.95
    assert outside["entropy"] > 5 * inside["entropy"]
    assert outside["mutual_information"] > 5 * inside["mutual_information"]


def _readme_requests() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(request, answer) of each curl of /predict in the README that is followed by its answer."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pairs = re.findall(r"```sh\n(curl [^`]*?/predict[^`]*?)```\s*```json\n(.*?)```", text, flags=re.DOTALL)
    requests = []
    for command, answer in pairs:
        words = shlex.split(command.replace("\\\n", " "))
        requests.append((json.loads(words[words.index("-d") + 1]), json.loads(answer)))
    return requests


def _agree(shown: Any, real: Any, where: str) -> None:
    """What the README shows, to the digits that it shows; identifiers are free, and `…` stands for what it leaves out."""
    if isinstance(shown, dict):
        for key, value in shown.items():
            if key != "id":
                _agree(value, real[key], f"{where}.{key}")
    elif isinstance(shown, list):
        for index, value in enumerate(shown):
            _agree(value, real[index], f"{where}.{index}")
    elif isinstance(shown, float):
        assert real == pytest.approx(shown, abs=2e-4), where
    else:
        assert real == shown, where


def test_the_readme_shows_the_real_answers(client: httpx.Client) -> None:
    requests = _readme_requests()
    assert len(requests) == 2
    for body, shown in requests:
        _agree(shown, _predict(client, **body), body["inputs"])


def test_an_answer_does_not_depend_on_the_traffic_around_it(client: httpx.Client) -> None:
    alone = _predict(client, inputs=OUT_OF_SCOPE)["predictions"][0]["probabilities"]
    queries = [f"{'please ' * n}book me a table for {n} people" for n in range(12)]
    with ThreadPoolExecutor(13) as pool:
        noise = [pool.submit(_predict, client, inputs=text, num_samples=1 + n, seed=n) for n, text in enumerate(queries)]
        amid = pool.submit(_predict, client, inputs=OUT_OF_SCOPE).result()["predictions"][0]["probabilities"]
        assert all(future.result() for future in noise)
    assert amid == pytest.approx(alone, abs=1e-5)


def test_another_replica_gives_the_same_answer(client: httpx.Client, base: str) -> None:
    process, url = _start(base, "--threads", "1")
    try:
        _wait_until_ready(process, url)
        with httpx.Client(base_url=url, timeout=120) as other:
            here, there = (_predict(server, inputs=IN_SCOPE)["predictions"][0] for server in (client, other))
        assert there["probabilities"] == pytest.approx(here["probabilities"], abs=1e-5)
        assert there["mutual_information"] == pytest.approx(here["mutual_information"], abs=1e-5)
    finally:
        process.kill()
        process.communicate()


def test_metrics_count_what_was_served(client: httpx.Client) -> None:
    def predictions() -> float:
        families = text_string_to_metric_families(client.get("/metrics").text)
        return sum(s.value for family in families for s in family.samples if s.name == "scalabl_predictions_total")

    before = predictions()
    _predict(client, inputs=[IN_SCOPE, OUT_OF_SCOPE, IN_SCOPE])
    assert predictions() == before + 3


def test_sigterm_answers_what_is_running_and_exits_cleanly(base: str) -> None:
    process, url = _start(base)
    _wait_until_ready(process, url)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(httpx.post, f"{url}/predict", json={"inputs": [IN_SCOPE] * 64}, timeout=120)
        deadline = time.monotonic() + 30
        while "scalabl_batch_rows_count 0.0" in httpx.get(f"{url}/metrics").text:  # until its first pass has ended
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGTERM)
        assert running.result().status_code == 200
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_an_adapter_for_another_model_ends_the_process_with_one_line(base: str, tmp_path: Path) -> None:
    process, _ = _start(base, "--adapter", str(tmp_path))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"error: {tmp_path} has no adapter_config.json" in errors.decode()
    assert "Traceback" not in errors.decode()
