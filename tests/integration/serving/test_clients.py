"""Clients of other projects for the Open Inference Protocol, each in an environment of its own: KServe's SDK and MLServer's.

They need versions of packages that this project's environment does not have. Triton's client: `test_open_inference`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.support.process import Served, served, write_models

pytestmark = pytest.mark.integration

PACKAGES = {"kserve": "kserve==0.21.0", "mlserver": "mlserver==1.7.1"}

# Prints what the SDK answers: the readiness of server and model, two answers, and the error of a binary input.
KSERVE = """
import asyncio, json, sys
import httpx, numpy
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig

async def main(url):
    client = InferenceRESTClient(RESTConfig(protocol="v2"))
    said = {"ready": await client.is_server_ready(url), "live": await client.is_server_live(url)}
    said["model"] = await client.is_model_ready(url, "colours")
    lists = InferRequest("colours", [InferInput("text", [2], "BYTES", ["abc", "de"])], request_id="mine")
    array = InferInput("text", [2, 1], "BYTES")
    array.set_data_from_numpy(numpy.array([["abc"], ["de"]], dtype=object), binary_data=False)
    arrays = InferRequest("colours", [array], parameters={"num_samples": 5, "seed": 3, "trace": "x"})
    for name, request in (("lists", lists), ("arrays", arrays)):
        response = await client.infer(url, request, model_name="colours")
        said[name] = {output.name: output.as_numpy().tolist() for output in response.outputs}
        said[name]["id"] = response.id
    binary = InferInput("text", [1], "BYTES")
    binary.set_data_from_numpy(numpy.array(["abc"], dtype=object))
    try:
        await client.infer(url, InferRequest("colours", [binary]), model_name="colours")
    except httpx.HTTPStatusError as error:
        said["refused"] = str(error)
    print(json.dumps(said, default=lambda value: value.decode()))

asyncio.run(main(sys.argv[1]))
"""
# Prints the body that MLServer's codec makes of two texts.
MLSERVER = """
from mlserver.codecs import StringCodec
from mlserver.types import InferenceRequest, Parameters
text = StringCodec.encode_input("text", ["abc", "de"])
print(InferenceRequest(id="mine", parameters=Parameters(content_type="str"), inputs=[text]).model_dump_json())
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(write_models(tmp_path_factory.mktemp("asked"))) as server:
        yield server


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of the programs of a virtual environment with one of `PACKAGES`; skips where it cannot be installed."""

    def install(package: str) -> Path:
        folder = tmp_path_factory.mktemp(package)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
        installed = subprocess.run([*pip, PACKAGES[package]], capture_output=True, text=True, timeout=900)
        if installed.returncode:
            last = installed.stderr.strip().splitlines()[-1]
            pytest.skip(f"{PACKAGES[package]} cannot be installed with pip here: {last}")
        return folder / "bin"

    return install


def run(*command: str | Path) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout.strip()


def predicted(server: Served, **options: Any) -> list[dict[str, Any]]:
    body = {"inputs": ["abc", "de"]} | options
    return list(httpx.post(f"{server.url}/predict", json=body).json()["predictions"])


def agrees(outputs: dict[str, Any], predictions: list[dict[str, Any]]) -> None:
    assert outputs["prediction"] == [p["prediction"] for p in predictions]
    for name in ("confidence", "entropy", "expected_entropy", "mutual_information"):
        assert outputs[name] == pytest.approx([p[name] for p in predictions], rel=0, abs=1e-6)


def test_kserves_sdk_gets_the_numbers_of_predict(server: Served, environment: Callable[[str], Path]) -> None:
    said = json.loads(run(environment("kserve") / "python", "-c", KSERVE, server.url).splitlines()[-1])
    assert (said["ready"], said["live"], said["model"]) == (True, True, True)
    agrees(said["lists"], predicted(server))
    assert said["lists"]["id"] == "mine"
    agrees(said["arrays"], predicted(server, num_samples=5, seed=3))
    assert "pass binary_data=False to set_data_from_numpy" in said["refused"]


def test_mlservers_client_and_codec_get_the_numbers_of_predict(
    server: Served, environment: Callable[[str], Path], tmp_path: Path
) -> None:
    programs = environment("mlserver")
    body = run(programs / "python", "-c", MLSERVER).splitlines()[-1]
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{server.url}/v2/models/colours/infer", content=body, headers=headers)
    assert answer.status_code == 200, answer.text
    agrees({output["name"]: output["data"] for output in answer.json()["outputs"]}, predicted(server))

    (tmp_path / "asked.txt").write_text(body + "\n", encoding="utf-8")
    files = ("--input-data-path", tmp_path / "asked.txt", "--output-data-path", tmp_path / "answered.txt")
    run(programs / "mlserver", "infer", "--url", f"127.0.0.1:{server.port}", "--model-name", "colours", *files)
    outputs = json.loads((tmp_path / "answered.txt").read_text(encoding="utf-8"))["outputs"]
    agrees({output["name"]: output["data"] for output in outputs}, predicted(server))
