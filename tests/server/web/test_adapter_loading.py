"""Loading and unloading adapters while the server runs: a refusal changes nothing, and no request loses its answer."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from fastapi.testclient import TestClient
from safetensors.torch import load_file, save_file
from scalabl_server.engines.transformers_engine import TransformersEngine

from scalabl.model.attachment import Host
from tests import tiny
from tests.server.conftest import Gate, wait_until
from tests.server.web.test_limits import lifetime_of
from tests.server.web.test_refusals import ask, refused

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter root with `other` (answers differ from `colours`) and `letters`; next to the root, `outside`."""
    folder = tmp_path_factory.mktemp("loading")
    tiny.write_adapter(folder / "root" / "other", posterior_scale=0.0)
    tiny.write_adapter(folder / "root" / "letters", task=tiny.MULTIPLE_CHOICE)
    tiny.write_adapter(folder / "outside")
    return folder / "root"


@pytest.fixture
def start(serve: Callable[..., TestClient], root: Path) -> Callable[..., TestClient]:
    def started(**settings: Any) -> TestClient:
        return serve(**{"enable_adapter_loading": True, "adapter_root": root} | settings)

    return started


def load(client: TestClient, name: str, path: str, **more: Any) -> httpx.Response:
    return client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path} | more)


def unload(client: TestClient, name: str) -> httpx.Response:
    return client.post("/v1/unload_lora_adapter", json={"lora_name": name})


def names(client: TestClient) -> list[str]:
    return [each["name"] for each in client.get("/info").json()["adapters"]]


def answer(client: TestClient, adapter: str, **more: Any) -> list[float]:
    response = ask(client, inputs="a text", adapter=adapter, **more)
    assert response.status_code == 200, response.text
    return list(response.json()["predictions"][0]["probabilities"].values())


def test_an_adapter_is_loaded_answers_and_is_unloaded(start: Callable[..., TestClient], letters: TestClient) -> None:
    client = start()
    before = answer(client, "colours")
    response = load(client, "new", "letters")
    assert (response.status_code, response.json()["task"]) == (200, "multiple_choice")
    assert names(client) == ["colours", "new"]
    assert "scalabl_adapters_loaded 2.0" in client.get("/metrics").text
    choices = ["x", "y", "z"]
    assert answer(client, "new", choices=choices) == pytest.approx(answer(letters, "letters", choices=choices), abs=1e-5)
    assert answer(client, "colours") == pytest.approx(before, abs=1e-5)
    response = unload(client, "new")
    assert (response.status_code, response.json()) == (200, {"adapters": ["colours"]})
    refused(ask(client, inputs="a", adapter="new"), 404, "unknown-adapter", "'new' is not loaded; this server has 'colours'")
    assert answer(client, "colours") == pytest.approx(before, abs=1e-5)


def test_an_absolute_path_below_the_root_is_taken(start: Callable[..., TestClient], root: Path) -> None:
    assert load(start(), "new", str(root / "other")).status_code == 200


def test_without_the_default_adapter_requests_must_name_one(start: Callable[..., TestClient]) -> None:
    client = start()
    assert load(client, "new", "other").status_code == 200
    assert unload(client, "colours").status_code == 200
    refused(ask(client, inputs="a"), 404, "unknown-adapter", "the default adapter is not loaded; this server has 'new'")
    assert client.get("/info").json()["adapter"] is None
    assert unload(client, "new").status_code == 200
    refused(ask(client, inputs="a"), 404, "unknown-adapter", "this server has no adapter")
    refused(unload(client, "new"), 404, "unknown-adapter")
    assert load(client, "colours", "other").status_code == 200
    assert ask(client, inputs="a").status_code == 200


def test_a_loaded_name_is_replaced_only_when_that_is_asked_for(start: Callable[..., TestClient]) -> None:
    client = start()
    before = answer(client, "colours")
    refused(load(client, "colours", "other"), 409, "adapter-conflict", "is already loaded; unload it first or set replace")
    assert answer(client, "colours") == pytest.approx(before, abs=1e-5)
    assert load(client, "colours", "other", replace=True).status_code == 200
    assert answer(client, "colours") != pytest.approx(before, abs=1e-5)
    assert names(client) == ["colours"]


def test_there_is_a_most_of_adapters(start: Callable[..., TestClient]) -> None:
    client = start(max_adapters=2)
    assert load(client, "two", "other").status_code == 200
    refused(load(client, "three", "other"), 409, "adapter-conflict", "2 adapters are loaded and the limit is 2")
    assert load(client, "two", "letters", replace=True).status_code == 200


def test_the_routes_do_not_exist_unless_enabled_and_want_a_key_where_keys_are_set(
    colours: TestClient, start: Callable[..., TestClient]
) -> None:
    refused(load(colours, "new", "other"), 404, "not-found")
    refused(unload(colours, "colours"), 404, "not-found")
    client = start(api_keys="one")
    refused(load(client, "new", "other"), 401, "unauthorized")
    refused(unload(client, "colours"), 401, "unauthorized")


@pytest.mark.parametrize(
    ("path", "status", "slug"),
    [
        ("../outside", 403, "path-not-allowed"),
        ("other/../../outside", 403, "path-not-allowed"),
        ("/etc", 403, "path-not-allowed"),
        ("/nowhere/at/all", 403, "path-not-allowed"),
        ("~root", 422, "invalid-adapter"),
        ("linked", 403, "path-not-allowed"),
        ("file-linked", 403, "path-not-allowed"),
        ("circle", 422, "invalid-"),
        ("pipe", 422, "invalid-adapter"),
        ("nowhere", 422, "invalid-adapter"),
        ("other\0", 422, "invalid-field"),
        ("a" * 4000, 422, "invalid-"),
        ("a" * 5000, 422, "invalid-field"),
        ("", 422, "invalid-field"),
        ("\ud800", 422, "invalid-field"),
        ("file:///etc", 422, "invalid-adapter"),
    ],
)
def test_a_path_that_leads_elsewhere_is_refused(
    start: Callable[..., TestClient], root: Path, path: str, status: int, slug: str
) -> None:
    if not (root / "linked").exists():
        (root / "linked").symlink_to(root.parent / "outside")
        (root / "circle").symlink_to(root / "circle")
        shutil.copytree(root / "other", root / "file-linked")
        (root / "file-linked" / WEIGHTS).unlink()
        (root / "file-linked" / WEIGHTS).symlink_to(root.parent / "outside" / WEIGHTS)
        shutil.copytree(root / "other", root / "pipe")
        (root / "pipe" / CONFIG).unlink()
        os.mkfifo(root / "pipe" / CONFIG)
    client = start()
    content = json.dumps({"lora_name": "new", "lora_path": path})
    response = client.post("/v1/load_lora_adapter", content=content, headers={"content-type": "application/json"})
    assert (response.status_code, names(client)) == (status, ["colours"]), response.text
    assert response.json()["type"].startswith(f"urn:scalabl:problem:{slug}")
    assert str(root.parent) not in response.text


@pytest.mark.parametrize("name", ["", "a/b", "../x", "a b", "-x", "x" * 65, "\0", "ä"])
def test_a_name_that_is_none_is_refused(start: Callable[..., TestClient], name: str) -> None:
    refused(load(start(), name, "other"), 422, "invalid-field", "lora_name: use up to 64 letters")


def _edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def _edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut weights": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-7]), "is not a safetensors file"),
    "empty weights": (lambda f: (f / WEIGHTS).write_bytes(b""), "is not a safetensors file"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "there is no adapter_model.safetensors"),
    "weights that are a folder": (lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()), "is not a regular file"),
    "config that is no JSON": (lambda f: (f / CONFIG).write_text("{"), "cannot be read as JSON"),
    "deep config": (lambda f: (f / CONFIG).write_text("[" * 100_000), "cannot be read as JSON"),
    "config of another kind": (lambda f: _edit_config(f, peft_type="LORA"), "peft_type is 'LORA'"),
    "unknown module": (lambda f: _edit_config(f, target_modules=["w_pack"]), "target module 'w_pack' matches no"),
    "another rank": (lambda f: _edit_config(f, r=10**9), "the base model and adapter_config.json require [1000000000]"),
    "no tensors": (lambda f: _edit_weights(f, dict.clear), "has no tensor named <module>.s_mean"),
    "missing tensor": (lambda f: _edit_weights(f, lambda w: w.pop("lm_head.lora_A")), "'lm_head.lora_A' is missing"),
    "not finite": (lambda f: _edit_weights(f, lambda w: w["lm_head.lora_A"].fill_(float("nan"))), "not finite"),
    "overflowing": (lambda f: _edit_weights(f, lambda w: w["lm_head.lora_B"].fill_(3e38)), "logits that are not finite"),
    "without effect": (lambda f: _edit_weights(f, lambda w: [t.zero_() for n, t in w.items() if "lora_B" in n]), "no logit"),
    "too large": (lambda f: os.truncate(f / WEIGHTS, 2**31), "the limit is 1073741824"),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_damaged_adapter_is_refused_and_changes_nothing(
    start: Callable[..., TestClient], tmp_path: Path, damage: str
) -> None:
    shutil.copytree(tiny.write_adapter(tmp_path / "whole"), tmp_path / "root" / "damaged")
    break_it, said = DAMAGE[damage]
    break_it(tmp_path / "root" / "damaged")
    client = start(adapter_root=tmp_path / "root")
    before = answer(client, "colours")
    for name, more in (("new", {}), ("colours", {"replace": True})):
        response = load(client, name, "damaged", **more)
        refused(response, 422, "invalid-adapter", "lora_path: ", said)
        assert str(tmp_path) not in response.text
    assert names(client) == ["colours"]
    assert answer(client, "colours") == before


def test_requests_that_are_running_end_with_the_adapter_they_began_with(
    start: Callable[..., TestClient], gate: Gate
) -> None:
    client = start(load=gate.load)
    gate.open.set()
    before = answer(client, "colours")
    gate.open.clear()
    gate.entered.clear()
    with ThreadPoolExecutor(4) as pool:
        running = pool.submit(answer, client, "colours")
        assert gate.entered.wait(30)
        wait_until(lambda: lifetime_of(client).admission.inputs == 0)  # the loop knows of the pass
        waiting = pool.submit(answer, client, "colours")
        wait_until(lambda: lifetime_of(client).admission.inputs == 1)
        # The change waits for the model's thread; whoever asks after it has happened gets the new adapter.
        replaced = pool.submit(load, client, "colours", "other", replace=True)
        gate.open.set()
        assert running.result() == pytest.approx(before, abs=1e-5)
        assert waiting.result() == pytest.approx(before, abs=1e-5)
        assert replaced.result().status_code == 200
    after = answer(client, "colours")
    assert after != pytest.approx(before, abs=1e-5)
    gate.open.clear()
    gate.entered.clear()
    with ThreadPoolExecutor(3) as pool:
        running = pool.submit(answer, client, "colours")
        assert gate.entered.wait(30)
        wait_until(lambda: lifetime_of(client).admission.inputs == 0)  # the loop knows of the pass
        waiting = pool.submit(answer, client, "colours")
        wait_until(lambda: lifetime_of(client).admission.inputs == 1)
        unloaded = pool.submit(unload, client, "colours")
        wait_until(lambda: not names(client))  # a request that still found it would wait at the gate
        refused(ask(client, inputs="a"), 404, "unknown-adapter")
        gate.open.set()
        assert unloaded.result().status_code == 200
        assert running.result() == pytest.approx(after, abs=1e-5)
        assert waiting.result() == pytest.approx(after, abs=1e-5)
    engine = lifetime_of(client).serving().engine
    assert isinstance(engine, TransformersEngine)
    assert Host.of(engine.pretrained.model).attached is None, "nothing of an unloaded adapter stays"


def test_adapters_come_and_go_amid_traffic_and_every_request_gets_an_answer(start: Callable[..., TestClient]) -> None:
    client = start()
    expected = answer(client, "colours")

    def traffic(_: int) -> bool:
        extra = ask(client, inputs="a text", adapter="extra")
        assert extra.status_code in (200, 404), extra.text
        return answer(client, "colours") == pytest.approx(expected, abs=1e-5)

    def changes(_: int) -> None:
        assert load(client, "extra", "other").status_code == 200
        assert unload(client, "extra").status_code == 200

    with ThreadPoolExecutor(5) as pool:
        changing = pool.submit(lambda: [changes(n) for n in range(8)])
        assert all(pool.map(traffic, range(60)))
        changing.result()


def test_loading_needs_a_root(folders: Path) -> None:
    from scalabl_server.settings import ServeSettings

    with pytest.raises(ValueError, match="--enable-adapter-loading needs --adapter-root"):
        ServeSettings(adapter=folders / "colours", enable_adapter_loading=True)
