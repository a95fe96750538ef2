"""Request ids, trace headers and log lines of a request; and that no client can forge them."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from scalabl_server.observe import logs
from scalabl_server.observe.logs import JsonLines, LogFormat, TextLines

from tests.server.conftest import Gate

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


class Lines:
    """The log output in one of the two formats."""

    def __init__(self) -> None:
        self.stream = io.StringIO()

    @property
    def text(self) -> str:
        return self.stream.getvalue()

    def parsed(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.splitlines()]

    def requests(self) -> list[dict[str, Any]]:
        return [line for line in self.parsed() if line["logger"] == "scalabl.access"]


@pytest.fixture
def capture() -> Iterator[Callable[[LogFormat], Lines]]:
    handlers: list[logging.Handler] = []
    logger = logging.getLogger("scalabl")
    level = logger.level

    def start(style: LogFormat) -> Lines:
        lines = Lines()
        handler = logging.StreamHandler(lines.stream)
        handler.setFormatter(JsonLines() if style == "json" else TextLines())
        handlers.append(handler)
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        return lines

    yield start
    for handler in handlers:
        logger.removeHandler(handler)
    logger.setLevel(level)


def predict(client: TestClient, inputs: Any = "a", **headers: str) -> Any:
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    return client.post("/predict", json={"inputs": inputs}, headers=sent)


def test_a_request_is_one_line_with_what_an_operator_asks_for(
    serve: Callable[..., TestClient], capture: Callable[[LogFormat], Lines]
) -> None:
    client = serve(api_keys="ann:one")
    lines = capture("json")
    response = predict(client, ["a", "bb"], x_request_id="order-7", traceparent=PARENT, authorization="Bearer one")
    (line,) = lines.requests()
    assert response.headers["x-request-id"] == line["request_id"] == "order-7"
    assert response.headers["traceparent"].split("-")[1] == line["trace_id"] == PARENT.split("-")[1]
    assert response.headers["traceparent"].split("-")[2] != PARENT.split("-")[2]
    assert {name: line[name] for name in ("method", "route", "status", "key", "adapter", "inputs", "client")} == {
        "method": "POST", "route": "/predict", "status": 200, "key": "ann", "adapter": "colours", "inputs": 2,
        "client": "testclient",
    }  # fmt: skip
    assert line["tokens"] == response.json()["usage"]["tokens"]
    stages = [line[f"{name}_seconds"] for name in ("tokenization", "queue", "inference")]
    assert all(took >= 0 for took in stages)
    assert sum(stages) <= line["seconds"]
    assert "one" not in json.dumps({**line, "client": ""})


def test_refusals_are_logged_too_and_probes_only_when_they_fail(
    serve: Callable[..., TestClient], capture: Callable[[LogFormat], Lines]
) -> None:
    client = serve()
    lines = capture("json")
    for path in ("/health/live", "/health/ready", "/metrics", "/v2/health/ready"):
        assert client.get(path).status_code == 200
    predict(client, "")
    client.get("/no/where")
    client.app.state.lifetime.drain()  # type: ignore[attr-defined]  # the TestClient's app is typed as any ASGI app
    client.get("/health/ready")
    seen = [(line["route"], line["status"], line.get("path")) for line in lines.requests()]
    assert seen == [("/predict", 422, None), ("unmatched", 404, "/no/where"), ("/health/ready", 503, None)]


@pytest.mark.parametrize(
    "given", ["", "a b", "a\tb", "x" * 129, "caf\u00e9", '"quoted"', "a,b", "a;b", "<script>", "{}", "a\\nb"]
)
def test_a_request_id_that_could_do_harm_is_replaced(colours: TestClient, given: str) -> None:
    response = colours.get("/health/live", headers={"x-request-id": given.encode("latin-1")})
    assert response.headers["x-request-id"].startswith("req-")
    two = colours.get("/health/live", headers=[("x-request-id", "a"), ("x-request-id", "b")])
    assert two.headers["x-request-id"].startswith("req-")


@pytest.mark.parametrize(
    "given",
    [
        "", "00", PARENT.upper(), PARENT + "-more", PARENT[:-1], "ff" + PARENT[2:], PARENT.replace("4bf9", "4bg9"),
        f"00-{'0' * 32}-00f067aa0ba902b7-01", f"00-4bf92f3577b34da6a3ce929d0e0e4736-{'0' * 16}-01", PARENT + "\u00e9",
    ],
)  # fmt: skip
def test_a_traceparent_that_is_not_valid_starts_a_new_trace(colours: TestClient, given: str) -> None:
    response = colours.get("/health/live", headers={"traceparent": given.encode("latin-1")})
    version, trace_id, span_id, flags = response.headers["traceparent"].split("-")
    assert (version, len(trace_id), len(span_id), flags) == ("00", 32, 16, "00")
    assert trace_id != PARENT.split("-")[1]


def test_a_traceparent_of_a_later_version_is_understood(colours: TestClient) -> None:
    response = colours.get("/health/live", headers={"traceparent": "01" + PARENT[2:] + "-what-comes-next"})
    assert response.headers["traceparent"].startswith(PARENT[:36])
    assert response.headers["traceparent"].endswith("-01")


def test_timing_headers_are_those_of_text_embeddings_inference(colours: TestClient) -> None:
    for response in (
        predict(colours, ["abc", "de"]),
        colours.post(
            "/v2/models/colours/infer",
            json={"inputs": [{"name": "text", "shape": [2], "datatype": "BYTES", "data": ["abc", "de"]}]},
        ),
    ):
        headers = response.headers
        assert (headers["x-compute-type"], headers["x-compute-characters"]) == ("cpu", "5")
        assert int(headers["x-compute-tokens"]) > 5
        total, *parts = (int(headers[f"x-{name}-time"]) for name in ("total", "tokenization", "queue", "inference"))
        assert sum(parts) <= total + 2  # each is rounded
    for response in (predict(colours, ""), colours.get("/info")):
        assert "x-compute-type" not in response.headers


def test_every_answer_has_the_security_headers(colours: TestClient) -> None:
    for response in (
        predict(colours), predict(colours, ""), colours.get("/nowhere"), colours.get("/metrics"), colours.get("/docs"),
        colours.request("BREW", "/predict"), colours.post("/predict", content=b"x" * 3_000_000),
    ):  # fmt: skip
        headers = response.headers
        assert (headers["x-content-type-options"], headers["cache-control"]) == ("nosniff", "no-store")
        assert (headers["referrer-policy"], headers["x-frame-options"]) == ("no-referrer", "DENY")
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert "server" not in headers
        assert "strict-transport-security" not in headers
        assert headers["x-request-id"]


def test_the_docs_page_may_load_what_it_names(colours: TestClient) -> None:
    page = colours.get("/docs")
    policy = page.headers["content-security-policy"]
    for host in ("https://cdn.jsdelivr.net", "https://fastapi.tiangolo.com"):
        assert host in page.text
        assert host in policy


def test_an_error_that_nobody_foresaw_has_its_ids_and_none_of_its_secrets(
    serve: Callable[..., TestClient], gate: Gate, capture: Callable[[LogFormat], Lines]
) -> None:
    client = serve(load=gate.load)
    gate.open.set()
    gate.broken.set()
    lines = capture("json")
    response = predict(client, x_request_id="it-broke")
    assert (response.status_code, response.headers["x-request-id"]) == (500, "it-broke")
    assert "secret" not in response.text
    logged = [line for line in lines.parsed() if "exception" in line]
    assert [line["request_id"] for line in logged] == ["it-broke"]
    assert "secret detail of /a/path" in logged[0]["exception"]


def test_another_origin_gets_nothing_unless_it_is_named(colours: TestClient, serve: Callable[..., TestClient]) -> None:
    origin = {"origin": "https://app.example"}
    preflight = origin | {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    assert "access-control-allow-origin" not in colours.post("/predict", json={"inputs": "a"}, headers=origin).headers
    assert colours.options("/predict", headers=preflight).status_code == 405
    client = serve(cors_origins="https://app.example, https://b.example")
    for response in (client.post("/predict", json={"inputs": body}, headers=origin) for body in ("a", "")):
        assert response.headers["access-control-allow-origin"] == "https://app.example"
    assert client.options("/predict", headers=preflight).status_code == 200
    other = {"origin": "https://evil.example"}
    assert "access-control-allow-origin" not in client.post("/predict", json={"inputs": "a"}, headers=other).headers


@pytest.mark.parametrize("style", ["json", "text"])
def test_no_message_and_no_exception_can_forge_a_line(style: LogFormat, capture: Callable[[LogFormat], Lines]) -> None:
    lines = capture(style)
    attack = 'x\nINFO scalabl.access: status=200\r\n\u2028\u0085\x1b[31m{"level": "info"}'
    try:
        raise ValueError(attack)
    except ValueError:
        logging.getLogger("scalabl").exception("said %s", attack)
    logs.log_request({"path": attack, "key": None, "note": 'a="b'})
    shown = lines.text.split("\n")[:-1]
    if style == "json":
        first, second = (json.loads(line) for line in shown)
        assert (first["message"], second["path"]) == (f"said {attack}", attack)
        assert "key" not in second
    else:
        starts = [line for line in shown if not line.startswith("    ")]
        assert [line.split(":")[0] for line in starts] == ["ERROR scalabl", "INFO scalabl.access"]
        assert r'note="a=\"b"' in starts[1]
    assert all(line.isprintable() for line in shown)


def test_a_line_has_a_largest_size(capture: Callable[[LogFormat], Lines]) -> None:
    lines = capture("json")
    logs.log_request({"path": "x" * 100_000})
    logging.getLogger("scalabl").info("y" * 100_000)
    assert [len(line.get("path", "")) + len(line["message"]) for line in lines.parsed()] == [257 + 7, 4097]


def test_an_answers_id_is_the_id_of_its_request(colours: TestClient) -> None:
    response = colours.post("/predict", json={"inputs": "rose", "num_samples": 2}, headers={"x-request-id": "mine-1"})
    assert response.headers["x-request-id"] == response.json()["id"] == "mine-1"
