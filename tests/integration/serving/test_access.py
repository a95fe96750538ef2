"""Access to a real server process: the admin port, TLS, rotated keys, the log, and spans at a real OTLP receiver."""

from __future__ import annotations

import gzip
import json
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from benchmarks.processes.port import free_port
from tests.integration.support.process import Served, served, write_models

pytestmark = pytest.mark.integration

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("access"))


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.02)


def status(url: str, **options: object) -> int | None:
    try:
        return httpx.get(url, timeout=10, **options).status_code  # type: ignore[arg-type]  # httpx has a type for each option
    except httpx.TransportError:
        return None


def test_the_admin_port_has_metrics_and_outlives_the_drain(models: Path) -> None:
    port = free_port()
    limits = {"max_samples": 256, "max_batch_tokens": 100_000}
    with served(models, admin_port=port, num_samples=32, **limits) as server:
        admin = f"http://127.0.0.1:{port}"
        assert [status(f"{base}/health/ready") for base in (admin, server.url)] == [200, 200]
        assert [status(f"{base}/metrics") for base in (admin, server.url)] == [200, 404]
        assert [status(f"{base}/info") for base in (admin, server.url)] == [404, 200]
        assert status(f"{admin}/docs") == status(f"{admin}/openapi.json") == 404
        body = {"inputs": ["some words " * 30] * 60, "num_samples": 64}
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(httpx.post, f"{server.url}/predict", json=body, timeout=120)
            wait_until(lambda: "scalabl_batch_rows_count 0.0" not in httpx.get(f"{admin}/metrics").text)
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: status(f"{server.url}/health/ready") == 503)
            assert httpx.post(f"{server.url}/predict", json={"inputs": "one more"}).status_code == 503
            assert status(f"{admin}/health/ready") == 503
            assert "scalabl_ready 0.0" in httpx.get(f"{admin}/metrics").text
            assert not running.done(), running.result().text[:500]
            assert running.result().status_code == 200
        assert server.process.wait(30) == 0
        assert status(f"{admin}/metrics") is None


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate authority, and its certificates for 127.0.0.1 and for a client."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed; apt-get install openssl")
    folder = tmp_path_factory.mktemp("certificates")
    new = ("req", "-newkey", "rsa:2048", "-nodes")
    openssl(folder, *new, "-x509", "-subj", "/CN=authority", "-keyout", "ca.key", "-out", "ca.pem", "-days", "2")
    for name in ("server", "client"):
        (folder / f"{name}.ext").write_text("subjectAltName=IP:127.0.0.1\n")
        openssl(folder, *new, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        signing = ("x509", "-req", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2")
        openssl(folder, *signing, "-in", f"{name}.csr", "-extfile", f"{name}.ext", "-out", f"{name}.pem")
    return folder


def trust(certificates: Path, client: bool = False) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=certificates / "ca.pem")
    if client:
        context.load_cert_chain(certificates / "client.pem", certificates / "client.key")
    return context


def test_tls_on_the_main_port_and_clients_with_certificates(models: Path, certificates: Path) -> None:
    files = {"ssl_certfile": certificates / "server.pem", "ssl_keyfile": certificates / "server.key"}
    with served(models, **files) as server:
        answer = httpx.post(f"{server.url}/predict", json={"inputs": "a"}, verify=trust(certificates))
        assert answer.status_code == 200
        assert answer.headers["strict-transport-security"] == "max-age=31536000"
        assert status(f"http://127.0.0.1:{server.port}/health/live") is None
        refused = httpx.post(f"{server.url}/predict", content=b" " * 30_000_000, verify=trust(certificates), timeout=20)
        assert refused.status_code == 413
        assert server.stop() == 0
    with served(models, **files, ssl_ca_certs=certificates / "ca.pem", admin_port=free_port()) as server:
        assert status(f"{server.url}/health/live", verify=trust(certificates)) is None
        assert status(f"{server.url}/health/live", verify=trust(certificates, client=True)) == 200
        assert status(f"http://127.0.0.1:{server.admin_port}/metrics") == 200


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"ssl_certfile": "absent.pem"}, "error: the TLS certificate, key or CA certificates cannot be used"),
        ({"ssl_keyfile": "absent.key"}, "error: --ssl-keyfile and --ssl-ca-certs need --ssl-certfile"),
        ({"otlp_endpoint": "collector:4318"}, "error: --otlp-endpoint: 'collector:4318' is not a URL"),
    ],
)
def test_what_cannot_be_listened_with_ends_the_process_with_one_line(
    models: Path, options: dict[str, str], said: str
) -> None:
    with pytest.raises(AssertionError) as ended, served(models, **options):
        pass
    assert said in str(ended.value)
    assert "Traceback" not in str(ended.value)


def test_keys_rotate_without_a_restart_and_never_reach_the_log(models: Path, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("ann:first-secret\n")
    with served(models, api_keys_file=file, log_format="json", log_level="debug") as server:

        def asked(key: str) -> int:
            headers = {"authorization": f"Bearer {key}", "x-request-id": f"with-{key.partition('-')[0]}"}
            return httpx.post(f"{server.url}/predict", json={"inputs": "private words"}, headers=headers).status_code

        assert [asked("first-secret"), asked("second-secret")] == [200, 401]
        file.write_text("ann:second-secret\n")
        wait_until(lambda: asked("second-secret") == 200)
        assert asked("first-secret") == 401
        assert 'scalabl_key_requests_total{key="ann"}' in httpx.get(f"{server.url}/metrics").text
        assert server.stop() == 0
        lines = [json.loads(line) for line in server.log.splitlines()]
    requests = [line for line in lines if line["logger"] == "scalabl.access" and line["route"] == "/predict"]
    assert {(line["request_id"], line["status"], line.get("key")) for line in requests} >= {
        ("with-first", 200, "ann"),
        ("with-first", 401, None),
        ("with-second", 401, None),
        ("with-second", 200, "ann"),
    }
    assert any(line.get("message") == "reloaded the API keys; the names are now: ann" for line in lines)
    assert not any(word in server.log for word in ("first-secret", "second-secret", "private words"))


class Collector:
    """An OTLP receiver over HTTP."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                if self.path == "/v1/traces":
                    for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                        for scope in resource.scope_spans:
                            collector.spans.extend(scope.spans)
                self.send_response(200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.server.shutdown()
    collector.server.server_close()


def ask(server: Served, inputs: str, traceparent: str | None = None) -> httpx.Response:
    headers = {} if traceparent is None else {"traceparent": traceparent}
    return httpx.post(f"{server.url}/predict", json={"inputs": inputs}, headers=headers)


def test_spans_reach_a_collector_below_the_callers_span(models: Path, collector: Collector) -> None:
    with served(models, otlp_endpoint=collector.url) as server:
        answer = ask(server, "a", f"00-{TRACE}-{PARENT}-01")
        unsampled = ask(server, "a", f"00-{'a' * 32}-{'b' * 16}-00")
        refused = ask(server, "")
        assert server.stop() == 0  # flushes
    _, trace_id, span_id, flags = answer.headers["traceparent"].split("-")
    assert (trace_id, flags) == (TRACE, "01")
    mine = {span.name: span for span in collector.spans if span.trace_id.hex() == TRACE}
    assert set(mine) == {"POST /predict", "tokenize", "queue", "inference"}
    request = mine["POST /predict"]
    assert (request.span_id.hex(), request.parent_span_id.hex()) == (span_id, PARENT)
    assert {mine[name].parent_span_id.hex() for name in ("tokenize", "queue", "inference")} == {span_id}
    for name in ("tokenize", "queue", "inference"):
        assert request.start_time_unix_nano - 1e6 <= mine[name].start_time_unix_nano <= mine[name].end_time_unix_nano
        assert mine[name].end_time_unix_nano <= request.end_time_unix_nano + 1e6
    attributes = {attribute.key: attribute.value for attribute in request.attributes}
    assert attributes["http.response.status_code"].int_value == 200
    assert attributes["scalabl.adapter"].string_value == "colours"
    assert unsampled.headers["traceparent"].endswith("-00")
    assert not [span for span in collector.spans if span.trace_id.hex() == "a" * 32]
    alone = [span for span in collector.spans if span.trace_id.hex() == refused.headers["traceparent"].split("-")[1]]
    assert [span.name for span in alone] == ["POST /predict"]


def test_a_collector_that_is_away_harms_nobody(models: Path) -> None:
    with served(models, otlp_endpoint=f"http://127.0.0.1:{free_port()}") as server:
        started = time.monotonic()
        assert [ask(server, "a").status_code for _ in range(20)] == [200] * 20
        assert time.monotonic() - started < 10
        assert server.stop(seconds=30) == 0


def test_opentelemetrys_sdk_is_not_imported_unless_it_is_used() -> None:
    code = "import sys, scalabl_server.cli.main, scalabl_server.listen; print('opentelemetry.sdk' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
