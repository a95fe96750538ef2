"""The whole OpenAPI document against a live server, by schemathesis with all its checks; `-s` shows how many cases ran."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.support.process import Served, served, write_models

pytestmark = pytest.mark.integration

KEY = "very-secret"
LEAST_CASES = 10_000

# What JSON Schema cannot say of a valid request and the server refuses: a text of blanks only, choices that a task does not
# have, an adapter that is not there, a product of sizes, a number above a limit of this server, a folder that is no
# adapter. A 504 is the right answer to a client whose own X-Request-Timeout is shorter than any work.
CONFIG = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "401", "404"]

[[operations]]
include-path-regex = "/(predict|infer)$"
checks.positive_data_acceptance.expected-statuses = ["2xx", "401", "404", "413", "422", "504"]
checks.not_a_server_error.expected-statuses = ["2xx", "4xx", "504"]

[[operations]]
include-path-regex = "/(feedback|load_lora_adapter|unload_lora_adapter)$"
checks.positive_data_acceptance.expected-statuses = ["2xx", "401", "403", "404", "409", "422"]
"""

# Path parameters that lead to the adapter; without them nearly every generated name is a 404.
NAMED = """
[parameters]
"path.name" = "{adapter}"
"path.version" = "1"
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("fuzzed"))


@pytest.fixture(scope="module", params=["colours", "letters"])
def server(request: pytest.FixtureRequest, models: Path) -> Iterator[Served]:
    small = {"num_samples": 2, "max_samples": 8, "max_input_tokens": 120, "data_dir": models / f"data-{request.param}"}
    small |= {"enable_adapter_loading": True, "adapter_root": models}
    with served(models, request.param, api_keys=f"fuzz:{KEY}", log_format="json", **small) as server:
        yield server


ran: list[int] = []


def fuzz(server: Served, folder: Path, config: str, examples: int, seed: int) -> dict[str, Any]:
    """Run schemathesis and return its report. Requests time out after 20 s, so that a hang is an error."""
    (folder / "schemathesis.toml").write_text(config)
    command = [str(Path(sys.executable).with_name("schemathesis")), "--config-file", "schemathesis.toml", "run"]
    command += [f"{server.url}/openapi.json", "--checks", "all", "--header", f"Authorization: Bearer {KEY}"]
    command += ["--max-examples", str(examples), "--seed", str(seed), "--request-timeout", "20", "--continue-on-failure"]
    command += ["--generation-database", "none", "--no-color", "--report", "json", "--report-json-path", "report.json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1500)
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    assert done.returncode == 0, done.stdout[-20_000:]
    return report


@pytest.mark.parametrize("named", [True, False], ids=["to the adapter", "anywhere"])
def test_no_request_breaks_the_interface(server: Served, tmp_path: Path, named: bool) -> None:
    adapter = Path(str(server.settings["adapter"])).name
    config = CONFIG + (NAMED.format(adapter=adapter) if named else "")
    report = fuzz(server, tmp_path, config, examples=110, seed=1 + len(ran))
    assert report["failures"] == report["errors"] == []
    assert report["operations"]["tested"] == report["operations"]["total"] >= 18
    ran.append(report["test_cases"]["generated"])
    print(f"{adapter}, {'to the adapter' if named else 'anywhere'}: {ran[-1]} cases, {report['running_time']:.0f} s")
    lines = [json.loads(line) for line in server.log.splitlines()]
    assert [line for line in lines if line["level"] == "error" or "exception" in line] == []
    answered = [line for line in lines if line["logger"] == "scalabl.access" and line["route"] != "/health/ready"]
    failed = {(line["route"].rpartition("/")[2], line["status"]) for line in answered if line["status"] >= 500}
    assert failed <= {("predict", 504), ("infer", 504)}
    assert {200, 401, 404, 405, 415, 422} <= {line["status"] for line in answered}


def test_there_were_enough_cases() -> None:
    if len(ran) < 4:
        pytest.skip("counts the cases of the tests above; run them together")
    assert sum(ran) >= LEAST_CASES
