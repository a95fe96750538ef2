"""HEAD on every route that has GET, and requests whose target is an absolute URL."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.testclient import TestClient

from scalabl import __version__
from tests.server.web.test_refusals import refused

GETS = (
    "/health/live",
    "/health/ready",
    "/metrics",
    "/info",
    "/docs",
    "/openapi.json",
    "/dashboard",
    "/v2/health/live",
    "/v2",
)


@pytest.mark.parametrize("path", GETS)
def test_head_is_get_without_the_body(colours: TestClient, path: str) -> None:
    got, head = colours.get(path), colours.head(path)
    assert (got.status_code, head.status_code) == (200, 200)
    assert head.content == b""
    assert head.headers["content-type"] == got.headers["content-type"]
    assert {"x-request-id", "x-content-type-options"} <= head.headers.keys()
    if path != "/metrics":  # which counts the requests in between
        assert head.headers["content-length"] == got.headers["content-length"] == str(len(got.content))


def test_head_of_what_cannot_be_got_is_refused_like_get(colours: TestClient) -> None:
    for path, status in (("/predict", 405), ("/nowhere", 404), ("/predictions/pred-1", 404)):
        assert (colours.head(path).status_code, colours.head(path).content) == (status, b"")
    assert colours.head("/predict").headers["allow"] == "POST"
    response = colours.post("/health/live")
    refused(response, 405, "method-not-allowed", "/health/live supports only GET, HEAD")
    assert response.headers["allow"] == "GET, HEAD"


def test_head_is_counted_as_head_on_its_route(colours: TestClient) -> None:
    colours.head("/info")
    assert 'scalabl_requests_total{code="200",method="HEAD",route="/info"}' in colours.get("/metrics").text


def asked(client: TestClient, target: bytes, method: str = "GET") -> tuple[int, dict[str, Any]]:
    """Status and scope of a request with this target, in the scope that uvicorn makes of it."""
    path, _, query = target.partition(b"?")
    sent: list[dict[str, Any]] = []
    scope: dict[str, Any] = {
        "type": "http", "http_version": "1.1", "method": method, "scheme": "http", "root_path": "", "client": None,
        "path": path.decode(), "raw_path": path, "query_string": query, "headers": [(b"host", b"mine"), (b"accept", b"*/*")],
    }  # fmt: skip

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    assert client.portal is not None  # the client's context is entered
    client.portal.call(client.app, scope, receive, send)
    return sent[0]["status"], scope


@pytest.mark.parametrize(
    ("target", "status", "path", "host"),
    [
        (b"http://proxy.example/health/live", 200, "/health/live", b"proxy.example"),
        (b"HTTPS://proxy.example:8443/v2?x=1", 200, "/v2", b"proxy.example:8443"),
        (b"http://user:secret@proxy.example/info", 200, "/info", b"proxy.example"),
        (b"http://proxy.example", 404, "/", b"proxy.example"),
        (b"http://proxy.example/nowhere", 404, "/nowhere", b"proxy.example"),
        (b"http://proxy.example/v2/models/%63olours", 200, "/v2/models/colours", b"proxy.example"),
        (b"/http://proxy.example/info", 404, "/http://proxy.example/info", b"mine"),
        (b"ftp://proxy.example/info", 404, "ftp://proxy.example/info", b"mine"),
        (b"*", 404, "*", b"mine"),
    ],
)
def test_an_absolute_target_means_its_path(colours: TestClient, target: bytes, status: int, path: str, host: bytes) -> None:
    got, scope = asked(colours, target)
    assert (got, scope["path"]) == (status, path)
    assert [value for name, value in scope["headers"] if name == b"host"] == [host]


def test_an_absolute_target_keeps_its_query_and_its_method(colours: TestClient) -> None:
    assert asked(colours, b"http://x/v1/dashboard?adapter=other")[0] == 404
    assert asked(colours, b"http://x/v1/dashboard?adapter=colours")[0] == 200
    status, scope = asked(colours, b"http://x/health/live", "HEAD")
    assert (status, scope["method"]) == (200, "HEAD")
    assert colours.get("/info").json()["version"] == __version__
