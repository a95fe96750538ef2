"""`/info`, the health routes and the OpenAPI document."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastapi.testclient import TestClient
from transformers import BloomConfig

from benchmarks.random_model import VOCABULARY, adapter_config, random_adapter, random_base
from scalabl import __version__
from scalabl.files.adapter_directory import save_adapter
from tests import tiny
from tests.server.conftest import serving, settings_for


def test_info_names_what_is_loaded_and_what_may_be_asked(colours: TestClient) -> None:
    info = colours.get("/info").json()
    assert info["version"] == __version__
    base = {"name": "base", "architecture": "LlamaForCausalLM", "dtype": "float32", "device": "cpu", "quantization": None}
    assert info["model"] == base
    adapter = info["adapter"]
    assert (adapter["name"], adapter["r"], adapter["task"]) == ("colours", 4, "classification")
    assert (adapter["adapted_layers"], adapter["stochastic_parameters"]) == (5, 20)
    assert adapter["additional_parameters"] == sum(p.numel() for p in tiny.adapted().adapter_parameters().values())
    assert adapter["choices"] == list(tiny.CLASSIFICATION.choices)
    assert info["defaults"] == {"num_samples": 16, "seed": 0, "draw_scheme": "sobol"}
    assert info["limits"]["max_input_tokens"] == 120


def test_the_limits_are_the_settings(serve: Callable[..., TestClient]) -> None:
    limits = serve(max_samples=9, max_queue=7, request_timeout=2.5).get("/info").json()["limits"]
    assert (limits["max_samples"], limits["max_queue"], limits["request_timeout"]) == (9, 7, 2.5)


def test_a_base_model_without_a_context_length_is_limited_by_the_size_of_a_pass(tmp_path: Path) -> None:
    base = random_base(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4))
    base.save_pretrained(tmp_path / "base")
    tokenizer = tiny.tokenizer()
    tokenizer.model_max_length = int(1e30)  # as transformers gives a tokenizer that says nothing
    tokenizer.save_pretrained(tmp_path / "base")
    model = random_adapter(base, adapter_config("tiny-bloom", ("query_key_value",), tiny.CLASSIFICATION))
    save_adapter(tmp_path / "colours", model.config, dict(model.adapter_parameters()))
    for changes, longest in (({"max_batch_tokens": 2048}, 2048), ({"max_input_tokens": 50}, 50)):
        settings = settings_for(tmp_path, **{"max_input_tokens": None, "data_dir": tmp_path / "kept"} | changes)
        with serving(settings) as client:
            limits = client.get("/info").json()["limits"]
            assert (limits["max_input_tokens"], limits["max_input_chars"]) == (longest, 16 * longest)
            said = client.post("/predict", json={"inputs": "a" * (longest + 1), "num_samples": 1})
            assert (said.status_code, f"the limit is {longest}" in said.json()["detail"]) == (413, True)


def test_health(colours: TestClient) -> None:
    for path in ("/health/live", "/health/ready"):
        response = colours.get(path)
        assert (response.status_code, response.json()) == (200, {"status": "ok"})


def test_the_interface_is_documented_with_its_errors(colours: TestClient) -> None:
    assert colours.get("/docs").status_code == 200
    document = colours.get("/openapi.json").json()
    assert {"/predict", "/info", "/health/live", "/health/ready", "/metrics"} <= document["paths"].keys()
    responses = document["paths"]["/predict"]["post"]["responses"]
    assert {"200", "404", "413", "415", "422", "429", "503", "504"} <= responses.keys()
    for status in ("404", "413", "422", "429", "504"):
        assert list(responses[status]["content"]) == ["application/problem+json"], status
