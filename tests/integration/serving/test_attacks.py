"""Hand-made attacks over sockets against a real server process, each with the expected answer."""

from __future__ import annotations

import contextlib
import json
import select
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import httpx
import psutil
import pytest

from tests.integration.support.process import Served, served, write_models

pytestmark = pytest.mark.integration

HEADER_TIMEOUT, BODY_TIMEOUT = 1.0, 1.5
GOOD = b'{"inputs": "a"}'
MB = 1_000_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = write_models(tmp_path_factory.mktemp("attacked"))
    limits = {"header_timeout": HEADER_TIMEOUT, "body_timeout": BODY_TIMEOUT, "num_samples": 4, "max_input_tokens": 120}
    with served(folder, **limits, log_format="json") as server:
        yield server


@dataclass
class Answer:
    """The data received on a socket until the server closed it, or until one answer was complete."""

    raw: bytes

    @property
    def status(self) -> int | None:
        return int(self.raw.split(b" ", 2)[1]) if self.raw.startswith(b"HTTP/1.") else None

    @property
    def answers(self) -> int:
        return self.raw.count(b"HTTP/1.1 ")

    @property
    def problem(self) -> str:
        body = self.raw.partition(b"\r\n\r\n")[2]
        return str(json.loads(body[body.index(b"{") : body.index(b"}") + 1]).get("type", ""))


def send(server: Served, data: bytes, seconds: float = 10) -> Answer:
    """Send bytes, then read until the server closes the connection, or has answered and sends nothing for a moment."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as connection:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it may answer and close before all is sent
            connection.sendall(data)
        return receive(connection, seconds)


def receive(connection: socket.socket, seconds: float = 10) -> Answer:
    raw, deadline = b"", time.monotonic() + seconds
    while time.monotonic() < deadline:
        readable, _, _ = select.select([connection], [], [], 0.3 if _whole(raw) else deadline - time.monotonic())
        if not readable:
            break
        try:
            chunk = connection.recv(65536)
        except ConnectionResetError:
            break
        if not chunk:
            break
        raw += chunk
    return Answer(raw)


def _whole(raw: bytes) -> bool:
    head, separator, body = raw.partition(b"\r\n\r\n")
    lengths = [int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    return bool(separator and lengths and len(body) >= lengths[0])


def request(
    body: bytes = GOOD, headers: bytes = b"", path: bytes = b"/predict", method: bytes = b"POST", length: bool = True
) -> bytes:
    head = method + b" " + path + b" HTTP/1.1\r\nHost: x\r\n" + headers
    return head + (b"Content-Length: %d\r\n" % len(body) if length else b"") + b"\r\n" + body


def still_works(server: Served) -> None:
    answer = httpx.post(f"{server.url}/predict", json={"inputs": "a"}, timeout=10)
    assert answer.status_code == 200
    assert answer.json()["predictions"][0]["prediction"] in ("red", "green", "blue")


def chunked(*chunks: bytes, tail: bytes = b"0\r\n\r\n") -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks) + tail


TE = b"Transfer-Encoding: chunked\r\n"

# name -> (bytes, status, the end of the problem's type; "" where the answer is no problem)
ATTACKS: dict[str, tuple[bytes, int, str]] = {
    # what JSON parsers fall over
    "deep arrays": (request(b"[" * 900_000), 422, "invalid-field"),
    "deep objects": (request(b'{"a":' * 300_000), 422, "invalid-field"),
    "deep but closed": (request(b'{"inputs": ' + b"[" * 5000 + b"]" * 5000 + b"}"), 422, "invalid-field"),
    "NaN": (request(b'{"inputs": "a", "seed": NaN}'), 422, "invalid-field"),
    "Infinity": (request(b'{"inputs": "a", "num_samples": -Infinity}'), 422, "invalid-field"),
    "a number beyond doubles": (request(b'{"inputs": "a", "seed": 1e400}'), 422, "invalid-field"),
    "a number of 10^5 digits": (request(b'{"inputs": "a", "seed": ' + b"7" * 100_000 + b"}"), 422, "invalid-field"),
    "lone surrogate in a text": (request(b'{"inputs": "\\udc00"}'), 422, "invalid-field"),
    "lone surrogate in a choice": (request(b'{"inputs": "a", "choices": ["\\ud800", "b"]}'), 422, "invalid-field"),
    "lone surrogate in a name": (request(b'{"\\ud800": 1}'), 422, "invalid-field"),
    "duplicate keys": (request(b'{"inputs": "a", "inputs": "b"}'), 422, "invalid-field"),
    "duplicate keys, escaped": (request(b'{"inputs": "a", "\\u0069nputs": "b"}'), 422, "invalid-field"),
    "NUL in a text": (request(b'{"inputs": "a\\u0000b"}'), 200, ""),
    "raw NUL": (request(b'{"inputs": "a\x00b"}'), 422, "invalid-field"),
    "overlong UTF-8": (request(b'{"inputs": "\xc0\xaf"}'), 422, "invalid-field"),
    "UTF-16": (request(GOOD.decode().encode("utf-16")), 422, "invalid-field"),
    "byte order mark": (request(b"\xef\xbb\xbf" + GOOD), 200, ""),  # RFC 8259, 8.1: may be ignored
    "two byte order marks": (request(2 * b"\xef\xbb\xbf" + GOOD), 422, "invalid-field"),
    "trailing bytes": (request(GOOD + b"{}"), 422, "invalid-field"),
    "prototype": (request(b'{"inputs": "a", "__proto__": {}, "__class__": 1}'), 422, "invalid-field"),
    # too much of something
    "1e6 choices": (request(json.dumps({"inputs": "a", "choices": ["a"] * MB}).encode()), 413, "body-too-large"),
    "4e5 choices": (request(json.dumps({"inputs": "a", "choices": ["a"] * 390_000}).encode()), 422, "invalid-field"),
    "4e5 numbers for texts": (request(b'{"inputs": [' + b"1," * 390_000 + b"1]}"), 422, "invalid-field"),
    "1e5 unknown fields": (request(json.dumps({f"f{n}": 1 for n in range(100_000)}).encode()), 422, "invalid-field"),
    "1e5 inputs": (request(json.dumps({"inputs": ["a"] * 100_000}).encode()), 413, "input-too-large"),
    "a text of 1.9 MB": (request(json.dumps({"inputs": "a" * 1_900_000}).encode()), 413, "input-too-large"),
    "1e9 samples": (request(b'{"inputs": "a", "num_samples": 1000000000}'), 422, "invalid-field"),
    "100 MB declared": (request(b"", b"Content-Length: 100000000\r\n", length=False), 413, "body-too-large"),
    "10^30 bytes declared": (request(b"", b"Content-Length: 1" + b"0" * 30 + b"\r\n", length=False), 400, "bad-request"),
    "3 MB of chunks": (request(chunked(*[b"x" * 65536] * 46), TE, length=False), 413, "body-too-large"),
    "headers of 20 kB": (request(headers=b"X-A: " + b"a" * 20_000 + b"\r\n"), 431, "headers-too-large"),
    "headers without end": (b"GET / HTTP/1.1\r\nX-A: " + b"a" * 300_000, 431, "headers-too-large"),
    "2000 headers": (request(headers=b"".join(b"X-%d: a\r\n" % n for n in range(2000))), 431, "headers-too-large"),
    "a path of 20 kB": (request(path=b"/" + b"a" * 20_000), 431, "headers-too-large"),
    # wrong kinds of body
    "a form": (request(b"inputs=a", b"Content-Type: application/x-www-form-urlencoded\r\n"), 415, "unsupported-media-type"),
    "XML": (request(b"<!DOCTYPE x>", b"Content-Type: application/xml\r\n"), 415, "unsupported-media-type"),
    "gzip": (request(b"\x1f\x8b", b"Content-Encoding: gzip\r\n"), 415, "unsupported-media-type"),
    "no body": (request(b""), 422, "invalid-field"),
    # shapes that two servers could read in two ways
    "CL and TE": (request(b"0\r\n\r\nGET /info HTTP/1.1\r\nHost: x\r\n\r\n", TE), 400, "bad-request"),
    "two different CL": (request(headers=b"Content-Length: 3\r\n"), 400, "bad-request"),
    "CL list": (request(GOOD, b"Content-Length: 15, 16\r\n", length=False), 400, "bad-request"),
    "negative CL": (request(GOOD, b"Content-Length: -1\r\n", length=False), 400, "bad-request"),
    "CL with a plus": (request(GOOD, b"Content-Length: +15\r\n", length=False), 400, "bad-request"),
    "CL in hexadecimal": (request(GOOD, b"Content-Length: 0xf\r\n", length=False), 400, "bad-request"),
    "TE twice": (request(chunked(GOOD), TE + TE, length=False), 400, "bad-request"),
    "TE obfuscated": (request(chunked(GOOD), b"Transfer-Encoding: xchunked\r\n", length=False), 400, "bad-request"),
    "TE with more": (request(chunked(GOOD), b"Transfer-Encoding: gzip, chunked\r\n", length=False), 400, "bad-request"),
    "TE before a space": (request(chunked(GOOD), b"Transfer-Encoding : chunked\r\n", length=False), 400, "bad-request"),
    "TE after a vertical tab": (request(GOOD, b"Transfer-Encoding:\x0bchunked\r\n"), 400, "bad-request"),
    "chunk size is no number": (request(b"zz\r\na\r\n0\r\n\r\n", TE, length=False), 400, "bad-request"),
    "chunk size beyond any": (request(b"f" * 30 + b"\r\n", TE, length=False), 400, "bad-request"),
    "chunk without its end": (request(b"2\r\nabXX0\r\n\r\n", TE, length=False), 400, "bad-request"),
    "bare CR in a header": (request(headers=b"X-A: a\rTransfer-Encoding: chunked\r\n"), 400, "bad-request"),
    "NUL in a header": (request(headers=b"X-A: a\x00b\r\n"), 400, "bad-request"),
    "a header without colon": (request(headers=b"X-A\r\n"), 400, "bad-request"),
    "a header without name": (request(headers=b": a\r\n"), 400, "bad-request"),
    "a space first": (b"GET / HTTP/1.1\r\n Host: x\r\n\r\n", 400, "bad-request"),
    "two Hosts": (request(headers=b"Host: y\r\n"), 400, "bad-request"),
    "no Host": (b"GET /info HTTP/1.1\r\n\r\n", 400, "bad-request"),
    "two spaces": (b"GET  /info HTTP/1.1\r\nHost: x\r\n\r\n", 400, "bad-request"),
    "HTTP/0.9": (b"GET /info\r\n\r\n", 400, "bad-request"),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "bad-request"),
    "TLS to a plain port": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 500, 400, "bad-request"),
    "obsolete folding": (request(headers=b"X-A: a\r\n b\r\n"), 200, ""),  # RFC 9112, 5.2: may be read as a space
    "same CL twice": (request(headers=b"Content-Length: 15\r\n"), 200, ""),  # RFC 9110, 8.6: may be read as one
    "bare LF": (request().replace(b"\r\n", b"\n"), 200, ""),  # RFC 9112, 2.2: may be read as an end of line
    # odd requests
    "a Host that is no host": (request(path=b"/nowhere").replace(b"Host: x", b"Host: ["), 404, "not-found"),
    "an absolute URL": (request(path=b"http://evil.example/predict", method=b"GET"), 405, "method-not-allowed"),
    "an absolute URL, answered": (
        request(path=b"http://evil.example/predict"),
        200,
        "",
    ),  # RFC 9112, 3.2.2: must be accepted
    "an absolute URL of a user": (request(path=b"http://a:b@evil.example/nowhere"), 404, "not-found"),
    "an absolute URL of files": (request(path=b"file:///etc/passwd", method=b"GET"), 404, "not-found"),
    "CONNECT": (b"CONNECT evil.example:443 HTTP/1.1\r\nHost: x\r\n\r\n", 404, "not-found"),
    "TRACE": (b"TRACE /predict HTTP/1.1\r\nHost: x\r\n\r\n", 405, "method-not-allowed"),
    "a method of 10 kB": (b"A" * 10_000 + b" /predict HTTP/1.1\r\nHost: x\r\n\r\n", 405, "method-not-allowed"),
    "upgrade": (request(b"", b"Connection: upgrade\r\nUpgrade: websocket\r\n", method=b"GET"), 405, "method-not-allowed"),
    "new lines in a path": (request(path=b"/a%0d%0aX-Evil:%201"), 404, "not-found"),
    "a trailing slash": (request(path=b"/predict/"), 404, "not-found"),
    # paths in the place of names
    "adapter ../..": (request(b'{"inputs": "a", "adapter": "../../etc/passwd"}'), 404, "unknown-adapter"),
    "adapter absolute": (request(b'{"inputs": "a", "adapter": "/etc"}'), 404, "unknown-adapter"),
    "adapter with NUL": (request(b'{"inputs": "a", "adapter": "colours\\u0000.pt"}'), 404, "unknown-adapter"),
    "adapter URL": (request(b'{"inputs": "a", "adapter": "http://evil.example/x"}'), 404, "unknown-adapter"),
    "model ../..": (request(path=b"/v2/models/../../etc/passwd", method=b"GET"), 404, ""),
    "model ..%2f": (request(path=b"/v2/models/..%2f..%2fetc%2fpasswd", method=b"GET"), 404, ""),
    "model %00": (request(path=b"/v2/models/colours%00", method=b"GET"), 404, ""),
    "docs ../..": (request(path=b"/docs/../../etc/passwd", method=b"GET"), 404, "not-found"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_gets_its_answer(server: Served, name: str) -> None:
    data, status, slug = ATTACKS[name]
    started = time.monotonic()
    answer = send(server, data)
    assert answer.status == status, answer.raw[:2000]
    assert time.monotonic() - started < 5
    assert answer.answers == 1, answer.raw
    if slug:
        assert answer.problem == f"urn:scalabl:problem:{slug}"
    assert b"x-content-type-options: nosniff" in answer.raw
    assert b"Traceback" not in answer.raw
    assert b"server:" not in answer.raw.lower()
    still_works(server)


def test_100_mb_are_refused_before_they_are_sent(server: Served) -> None:
    before = psutil.Process(server.process.pid).memory_info().rss
    answer = send(server, request(b" " * (100 * MB)))
    assert (answer.status, answer.problem) == (413, "urn:scalabl:problem:body-too-large")
    answer = send(server, request(chunked(*[b" " * MB] * 100), TE, length=False))
    assert (answer.status, answer.problem) == (413, "urn:scalabl:problem:body-too-large")
    with ThreadPoolExecutor(8) as pool:
        assert {answer.status for answer in pool.map(lambda _: send(server, request(b" " * (100 * MB))), range(8))} == {413}
    assert psutil.Process(server.process.pid).memory_info().rss - before < 50 * MB
    still_works(server)


def test_a_client_that_waits_for_100_continue_never_sends_what_is_too_large(server: Served) -> None:
    head = b"Expect: 100-continue\r\nContent-Length: %d\r\n"
    refused = send(server, request(b"", head % (100 * MB), length=False))
    assert (refused.status, refused.answers) == (413, 1)
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(request(b"", head % len(GOOD), length=False))
        assert connection.recv(1000).startswith(b"HTTP/1.1 100 ")
        connection.sendall(GOOD)
        assert receive(connection).status == 200


def drip(server: Served, first: bytes, byte: Callable[[int], bytes], seconds: float) -> tuple[Answer, float]:
    """Send `first`, then single bytes until the connection ends. Returns the answer and the seconds until then."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(first)
        raw, started, sent = b"", time.monotonic(), 0
        while time.monotonic() - started < seconds:
            readable, _, _ = select.select([connection], [], [], 0.1)
            try:
                if readable:
                    chunk = connection.recv(65536)
                    raw += chunk
                    if not chunk:
                        break
                connection.sendall(byte(sent))
            except (BrokenPipeError, ConnectionResetError):
                break
            sent += 1
        return Answer(raw), time.monotonic() - started


LINGER = 2.0  # the server's LINGER_SECONDS


@pytest.mark.parametrize(
    ("first", "byte", "limit", "status"),
    [
        pytest.param(b"POST /predict HT", lambda n: b"T", HEADER_TIMEOUT, 408, id="request line"),
        pytest.param(
            b"POST /predict HTTP/1.1\r\nHost: x\r\n",
            lambda n: b"X-%d: a\r\n" % n,
            HEADER_TIMEOUT,
            408,
            id="header after header",
        ),
        pytest.param(request(b"{", b"Content-Length: 500\r\n", length=False), lambda n: b" ", BODY_TIMEOUT, 408, id="body"),
        pytest.param(request(b"", TE, length=False), lambda n: b"1\r\n \r\n", BODY_TIMEOUT, 408, id="chunks"),
        pytest.param(
            request(b"", b"Content-Length: 100000000\r\n", length=False), lambda n: b" ", 0.0, 413, id="after a refusal"
        ),
        pytest.param(
            request(b"", b"Content-Type: text/plain\r\nContent-Length: 1000\r\n", length=False),
            lambda n: b" ",
            0.0,
            415,
            id="after an early answer",
        ),
        pytest.param(request(b"", b"Content-Length: 1000\r\n", b"/info", b"GET", False), lambda n: b" ", 0.0, 200, id="GET"),
    ],
)
def test_a_slow_client_is_told_and_let_go(
    server: Served, first: bytes, byte: Callable[[int], bytes], limit: float, status: int
) -> None:
    answer, lived = drip(server, first, byte, seconds=20)
    assert answer.status == status, answer.raw
    assert limit - 0.1 <= lived < limit + LINGER + 2
    still_works(server)


def test_a_connection_on_which_nothing_comes_is_closed(server: Served) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        started = time.monotonic()
        assert connection.recv(10) == b""
        assert HEADER_TIMEOUT - 0.1 < time.monotonic() - started < HEADER_TIMEOUT + 2
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as connection:
        connection.sendall(request())
        assert receive(connection).status == 200
        assert connection.recv(10) == b""  # uvicorn's keep-alive


def test_slow_clients_do_not_keep_others_waiting(server: Served) -> None:
    held = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(300)]
    try:
        for connection in held:
            connection.sendall(b"POST /predict HTTP/1.1\r\n")
        started = time.monotonic()
        still_works(server)
        assert time.monotonic() - started < 2
    finally:
        for connection in held:
            connection.close()


def test_a_client_that_leaves_in_the_middle_harms_nobody(server: Served) -> None:
    for data in (
        b"POST /pre",
        request(b"{", b"Content-Length: 99\r\n", length=False),
        request(),
        request(chunked(b"{"), TE),
    ):
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
                connection.sendall(data)
    still_works(server)


def test_pipelined_requests_get_their_own_answers_in_order(server: Served) -> None:
    data = request() + request(b'{"inputs": ""}') + request(b"", b"", b"/health/live", b"GET")
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
        connection.sendall(data)
        raw, deadline = b"", time.monotonic() + 10
        while raw.count(b"HTTP/1.1 ") < 3 and time.monotonic() < deadline:
            raw += connection.recv(65536)
    assert [int(part.split(b" ", 1)[0]) for part in raw.split(b"HTTP/1.1 ")[1:]] == [200, 422, 200]


def test_a_refusal_in_the_middle_of_a_connection_leaves_it_usable(server: Served) -> None:
    with httpx.Client(base_url=server.url, timeout=10) as client:
        for body, status in (("a", 200), ("", 422), ("a", 200)):
            assert client.post("/predict", json={"inputs": body}).status_code == status
        assert client.post("/predict", content=b"a=b", headers={"content-type": "text/plain"}).status_code == 415
        assert client.post("/predict", json={"inputs": "a"}).status_code == 200


def test_zz_nothing_of_all_this_left_a_trace_that_should_not_be_there(server: Served) -> None:
    """Runs last: no unexpected error, and each line of the log is one JSON object of bounded size."""
    lines = [json.loads(line) for line in server.log.splitlines()]
    assert len(lines) > 100
    assert [line for line in lines if line["level"] == "error" or "exception" in line] == []
    assert max(len(json.dumps(line)) for line in lines) < 6000
    answers = [line for line in lines if line["logger"] == "scalabl.access" and line["route"] != "/health/ready"]
    assert {line["status"] for line in answers} <= {
        200, 400, 404, 405, 408, 413, 415, 422, 431, 499
    }  # fmt: skip
    assert server.stop() == 0
