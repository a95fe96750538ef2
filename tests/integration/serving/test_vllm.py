"""`scalabl serve --engine vllm` with a real vLLM server: the numbers of the default engine, and a vLLM killed under load."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import LlamaConfig

from benchmarks.processes.vllm import Vllm
from tests import tiny
from tests.integration.support.process import Served, served
from tests.integration.support.vllm_environment import python

pytestmark = [pytest.mark.integration, pytest.mark.vllm]

ROOT = Path(__file__).resolve().parents[3]
QUERIES = int(os.environ.get("SCALABL_VLLM_QUERIES", "200"))
TEXTS = ["the grass after rain", "rose", "the sea at night"]
NUM_SAMPLES = 4


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model `base` with heads of 32 values, the smallest that vLLM supports on a CPU, and the adapter `colours`."""
    python()
    folder = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patch:
        config = LlamaConfig(**tiny.SMALL, head_dim=32, tie_word_embeddings=True)
        patch.setitem(tiny.ARCHITECTURES, "llama", (config, tiny.ARCHITECTURES["llama"][1]))
        tiny.write_base(folder / "base")
        tiny.write_adapter(folder / "colours")
    return folder


@pytest.fixture
def vllm(models: Path) -> Iterator[Vllm]:
    with Vllm(models / "base", models / "vllm.log", python(), max_loras=NUM_SAMPLES).up() as server:
        yield server


def settings(vllm: Vllm, folder: Path, **changes: object) -> dict[str, Any]:
    fields = {"engine": "vllm", "engine_url": vllm.url, "engine_adapter_dir": folder / "loras", "outcomes_url": "none"}
    return fields | {"num_samples": NUM_SAMPLES, "engine_timeout": 300, "request_timeout": 300} | changes


def ask(server: Served, **body: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/predict", json=body, timeout=1800)


def predictions(server: Served, **body: Any) -> list[dict[str, Any]]:
    response = ask(server, **body)
    assert response.status_code == 200, response.text
    return list(response.json()["predictions"])


def differences(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> tuple[float, float]:
    """The largest difference of any probability, and of the mutual information."""
    assert len(one) == len(other)
    pairs = list(zip(one, other, strict=True))
    return (
        max(abs(p["probabilities"][name] - q["probabilities"][name]) for p, q in pairs for name in p["probabilities"]),
        max(abs(p["mutual_information"] - q["mutual_information"]) for p, q in pairs),
    )


def wait_until_ready(server: Served, status: int, seconds: float = 600) -> httpx.Response:
    deadline = time.monotonic() + seconds
    while (response := httpx.get(f"{server.url}/health/ready")).status_code != status:
        assert time.monotonic() < deadline, response.text
        time.sleep(0.05)
    return response


def test_the_same_queries_through_both_engines(shared: Path, tmp_path: Path) -> None:
    python()
    base = os.environ.get("SCALABL_EXAMPLE_BASE")
    if base is None:
        pytest.skip("SCALABL_EXAMPLE_BASE is not set; run `make integration-vllm`, which fetches the example's base model")
    adapter = str(ROOT / "examples" / "intent_router" / "adapter")
    rows = (shared / "data" / "clinc10" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:QUERIES]
    texts = [json.loads(row)["text"] for row in rows]
    common = {"num_samples": 10, "outcomes_url": "none", "model": base, "request_timeout": 1800, "worker_timeout": 3600}

    def all_of(server: Served) -> tuple[list[dict[str, Any]], float]:
        started = time.monotonic()
        answered = [
            prediction
            for start in range(0, len(texts), 20)
            for prediction in predictions(server, inputs=texts[start : start + 20])
        ]
        return answered, time.monotonic() - started

    with served(tmp_path, adapter, seconds=900, threads=2, warmup="quick", **common) as server:
        expected, seconds = all_of(server)
    with (
        Vllm(Path(base), tmp_path / "vllm.log", python()).up() as vllm,
        served(tmp_path, adapter, seconds=900, **settings(vllm, tmp_path, **common, engine_timeout=1800)) as server,
    ):
        answered, theirs = all_of(server)
    in_probability, in_information = differences(expected, answered)
    print(
        f"\n{len(texts)} queries, K = 10: largest difference {in_probability:.2g} in a probability, {in_information:.2g} in "
        f"mutual information; {seconds:.1f} s with transformers, {theirs:.1f} s with vLLM"
    )
    assert in_probability <= 2e-3
    assert in_information <= 2e-3
    assert [prediction["prediction"] for prediction in answered] == [prediction["prediction"] for prediction in expected]


def test_two_gateways_agree_and_a_killed_engine_comes_back(vllm: Vllm, models: Path) -> None:
    with served(models, **settings(vllm, models)) as one, served(models, **settings(vllm, models)) as other:
        expected = predictions(one, inputs=TEXTS)
        assert max(differences(expected, predictions(other, inputs=TEXTS))) <= 1e-5
        with served(models, num_samples=NUM_SAMPLES, outcomes_url="none") as plain:
            assert max(differences(predictions(plain, inputs=TEXTS), expected)) <= 1e-4

        with ThreadPoolExecutor(4) as pool:
            storm = [pool.submit(ask, one, inputs=TEXTS) for _ in range(200)]
            deadline = time.monotonic() + 300
            while sum(future.done() for future in storm) < 10:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            vllm.kill()
            answers = [future.result() for future in storm]
        assert {answer.status_code for answer in answers} == {200, 503}
        for answer in answers:
            if answer.status_code == 200:
                assert max(differences(expected, answer.json()["predictions"])) <= 1e-5
            else:
                problem = answer.json()
                assert problem["type"] == "urn:scalabl:problem:engine-unavailable"
                assert f"no vLLM server can answer: 127.0.0.1:{vllm.port}: " in problem["detail"]
                assert int(answer.headers["retry-after"]) >= 1
        assert wait_until_ready(one, 503).json()["type"] == "urn:scalabl:problem:engine-unavailable"
        assert httpx.get(f"{one.url}/health/live").status_code == 200

        vllm.start()  # empty: it has forgotten every LoRA
        vllm.wait()
        for server in (one, other):
            wait_until_ready(server, 200)
            assert max(differences(expected, predictions(server, inputs=TEXTS))) <= 1e-5


def test_a_server_without_one_of_the_loras_is_refused(models: Path, tmp_path: Path) -> None:
    export = [
        sys.executable,
        "-m",
        "scalabl_server.cli",
        "export",
        "vllm",
        "--adapter",
        models / "colours",
        "--model",
        models / "base",
    ]
    export += ["--output", tmp_path / "loras", "--num-samples", NUM_SAMPLES]
    printed = subprocess.run(map(str, export), capture_output=True, text=True, check=True, cwd=ROOT).stdout.splitlines()
    assert len(printed) == NUM_SAMPLES + 3
    vllm = Vllm(models / "base", tmp_path / "vllm.log", python(), loras=printed, max_loras=NUM_SAMPLES)
    with vllm.up():
        wanted = settings(vllm, tmp_path, engine_adapter_dir=tmp_path / "none")
        with served(models, **wanted) as server:
            assert len(predictions(server, inputs=TEXTS)) == 3
        with (
            pytest.raises(AssertionError, match=rf"it has no adapter scalabl-\w+-{NUM_SAMPLES} and does not load it"),
            served(models, **wanted | {"num_samples": NUM_SAMPLES + 1}),
        ):
            pytest.fail("it started, although a LoRA is missing")
