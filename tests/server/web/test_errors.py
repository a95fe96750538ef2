"""Problems as HTTP answers: every kind has a status, and the path decides the form."""

from __future__ import annotations

import json
from typing import get_args

import pytest
from scalabl_server.problems import Kind, ProblemError
from scalabl_server.web.errors import CLOSING, STATUSES, answer


def test_every_kind_of_problem_has_a_status_and_a_title() -> None:
    assert list(STATUSES) == list(get_args(Kind))
    assert set(CLOSING) <= set(STATUSES)


@pytest.mark.parametrize("kind", STATUSES)
def test_a_problem_is_a_problem_document(kind: Kind) -> None:
    status, title = STATUSES[kind]
    response = answer(ProblemError(kind, "say \udc80", field="seed"), "/predict")
    assert (response.status_code, response.media_type) == (status, "application/problem+json")
    body = {"type": f"urn:scalabl:problem:{kind}", "title": title, "status": status, "detail": "seed: say \udc80"}
    assert json.loads(bytes(response.body)) == body
    assert (response.headers.get("www-authenticate") == "Bearer") == (status == 401)
    assert (response.headers.get("connection") == "close") == (kind in CLOSING)


@pytest.mark.parametrize(("seconds", "header"), [(None, None), (0.2, "1"), (4.1, "5")])
def test_the_time_to_come_back_is_in_whole_seconds(seconds: float | None, header: str | None) -> None:
    assert answer(ProblemError("queue-full", "later", retry_after=seconds)).headers.get("retry-after") == header


@pytest.mark.parametrize(("path", "protocol"), [("/v2", True), ("/v2/models/x", True), ("/v20", False), ("/", False)])
def test_the_open_inference_protocol_has_its_own_form(path: str, protocol: bool) -> None:
    response = answer(ProblemError("unknown-adapter", "there is none"), path)
    assert (json.loads(bytes(response.body)) == {"error": "there is none"}) == protocol
