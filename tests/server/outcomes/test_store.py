"""`/feedback` and `/predictions/{id}`: what a client sees of the stored predictions and their labels."""

from __future__ import annotations

import hashlib
import hmac
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from scalabl_server.app import create_app
from scalabl_server.settings import ServeSettings

from tests.server.conftest import serving, settings_for, wait_until
from tests.server.web.test_refusals import refused

Serve = Callable[..., TestClient]


def _predict(client: TestClient, **body: Any) -> list[dict[str, Any]]:
    response = client.post("/predict", json={"num_samples": 2} | body)
    assert response.status_code == 200, response.text
    return list(response.json()["predictions"])


def _feedback(client: TestClient, *pairs: tuple[str, str | None]) -> list[str]:
    response = client.post("/feedback", json=[{"id": name, "label": label} for name, label in pairs])
    assert response.status_code == 200, response.text
    return [result["status"] for result in response.json()["results"]]


def totals(client: TestClient) -> dict[str, float]:
    """Each counter, summed over its labels."""
    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            sums[sample.name] = sums.get(sample.name, 0) + sample.value
    return sums


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'outcomes.db'}"


@pytest.fixture(scope="module")
def client(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    with serving(settings_for(folders, data_dir=tmp_path_factory.mktemp("kept"))) as made:
        yield made


def test_an_id_resolves_to_what_was_answered(client: TestClient) -> None:
    before = datetime.now(UTC)
    (answer,) = _predict(client, inputs="rose", return_samples=True)
    assert answer["recorded"] is True
    stored = client.get(f"/predictions/{answer['id']}").json()
    assert before <= datetime.fromisoformat(stored["created_at"]) <= datetime.now(UTC)
    answer.pop("samples")
    assert stored["prediction"] == answer
    assert (stored["id"], stored["model"], stored["adapter"]) == (answer["id"], "base", "colours")
    assert (stored["labelled"], stored["label"], stored["labels"]) == (False, None, [])


def test_an_input_is_kept_as_a_hash_only(client: TestClient) -> None:
    (answer,) = _predict(client, inputs="my secret")
    stored = client.get(f"/predictions/{answer['id']}")
    assert stored.json()["input_hash"] == hashlib.sha256(b"my secret").hexdigest()
    assert stored.json()["input"] is None
    assert "secret" not in stored.text


def test_an_input_is_stored_when_asked_for_and_hashed_with_a_key(serve: Serve, url: str) -> None:
    client = serve(outcomes_url=url, store_inputs=True, input_hash_key="pepper")
    (answer,) = _predict(client, inputs="a\x00b 🙂")
    stored = client.get(f"/predictions/{answer['id']}").json()
    assert stored["input"] == "a\x00b 🙂"
    assert stored["input_hash"] == hmac.new(b"pepper", "a\x00b 🙂".encode(), hashlib.sha256).hexdigest()


def test_the_same_label_twice_is_one_label_and_another_a_correction_that_is_kept(client: TestClient) -> None:
    (answer,) = _predict(client, inputs="rose")
    one = {"id": answer["id"], "label": "red"}
    assert client.post("/feedback", json=one).json() == {"results": [one | {"status": "recorded"}]}
    before = totals(client)
    assert client.post("/feedback", json=one).json() == {"results": [one | {"status": "unchanged"}]}
    assert totals(client)["scalabl_outcomes_total"] == before["scalabl_outcomes_total"]
    assert _feedback(client, (answer["id"], "blue")) == ["corrected"]
    after = totals(client)
    assert after["scalabl_outcomes_total"] == before["scalabl_outcomes_total"] + 1
    assert after["scalabl_outcomes_retracted_total"] == before["scalabl_outcomes_retracted_total"] + 1
    stored = client.get(f"/predictions/{answer['id']}").json()
    assert stored["label"] == "blue"
    assert [each["label"] for each in stored["labels"]] == ["red", "blue"]
    times = [datetime.fromisoformat(each["labelled_at"]) for each in stored["labels"]]
    assert datetime.fromisoformat(stored["created_at"]) <= times[0] < times[1]


OUTSIDE = ("scalabl_outcomes_total", "scalabl_outcomes_outside_total", "scalabl_outcomes_correct_total")


def test_none_of_the_choices_is_a_label_that_can_be_corrected_to_a_choice_and_back(client: TestClient) -> None:
    (answer,) = _predict(client, inputs="rose")
    name, predicted = answer["id"], answer["prediction"]
    start = totals(client)

    def counted() -> tuple[float, ...]:
        """What is left after corrections, since the start."""
        now = totals(client)
        retracted = [metric.replace("_total", "_retracted_total") for metric in OUTSIDE]
        return tuple(
            now[metric] - now[minus] - start[metric] + start[minus] for metric, minus in zip(OUTSIDE, retracted, strict=True)
        )

    def stored() -> tuple[bool, str | None, list[str | None]]:
        found = client.get(f"/predictions/{name}").json()
        return found["labelled"], found["label"], [each["label"] for each in found["labels"]]

    outside = {"id": name, "label": None}
    assert client.post("/feedback", json=outside).json() == {"results": [outside | {"status": "recorded"}]}
    assert (counted(), stored()) == ((1, 1, 0), (True, None, [None]))
    assert _feedback(client, (name, None), (name, None)) == ["unchanged", "unchanged"]
    assert (counted(), stored()) == ((1, 1, 0), (True, None, [None]))
    assert _feedback(client, (name, predicted)) == ["corrected"]
    assert (counted(), stored()) == ((1, 0, 1), (True, predicted, [None, predicted]))
    assert _feedback(client, (name, None)) == ["corrected"]
    assert (counted(), stored()) == ((1, 1, 0), (True, None, [None, predicted, None]))


def test_multiple_choice_has_truths_outside_too_and_they_survive_a_restart(folders: Path, url: str) -> None:
    settings = settings_for(folders, "letters", outcomes_url=url, replica_id="r")
    with serving(settings) as client:
        (answer,) = _predict(client, inputs="a", choices=["one", "two"])
        assert _feedback(client, (answer["id"], None)) == ["recorded"]
        before = totals(client)
    with serving(settings) as client:
        assert totals(client)["scalabl_outcomes_outside_total"] == before["scalabl_outcomes_outside_total"] == 1
        assert _feedback(client, (answer["id"], None)) == ["unchanged"]
        assert client.get(f"/predictions/{answer['id']}").json()["labelled"] is True


def test_the_label_null_is_documented(client: TestClient) -> None:
    schemas = client.get("/openapi.json").json()["components"]["schemas"]
    assert schemas["Outcome"]["properties"]["label"]["anyOf"] == [{"type": "string"}, {"type": "null"}]
    assert schemas["Outcome"]["required"] == ["id", "label"]
    assert "null if none of them is the true answer" in schemas["Outcome"]["properties"]["label"]["description"]


def test_a_database_of_the_release_before_is_migrated_with_its_labels(folders: Path, url: str, tmp_path: Path) -> None:
    settings = settings_for(folders, outcomes_url=url, replica_id="r")
    with serving(settings) as client:
        (answer,) = _predict(client, inputs="a")
        _feedback(client, (answer["id"], "red"))
    with closing(sqlite3.connect(tmp_path / "outcomes.db", isolation_level=None)) as connection:
        connection.execute("UPDATE scalabl_version SET version_num = '0002'")
    with serving(settings) as client:
        assert client.get(f"/predictions/{answer['id']}").json()["label"] == "red"
        assert _feedback(client, (answer["id"], None)) == ["corrected"]
    with closing(sqlite3.connect(tmp_path / "outcomes.db")) as connection:
        assert connection.execute("SELECT version_num FROM scalabl_version").fetchall() == [("0003",)]


def test_a_list_may_name_a_prediction_twice(client: TestClient) -> None:
    first, second = (answer["id"] for answer in _predict(client, inputs=["a", "b"]))
    given = [(first, "red"), (second, "red"), (first, "green"), (first, "green"), (first, "red")]
    assert _feedback(client, *given) == ["recorded", "recorded", "corrected", "unchanged", "corrected"]
    stored = client.get(f"/predictions/{first}").json()
    assert [each["label"] for each in stored["labels"]] == ["red", "green", "red"]
    assert stored["label"] == "red"


def test_a_list_with_a_wrong_item_is_refused_whole_and_the_item_named(client: TestClient) -> None:
    good, other = (answer["id"] for answer in _predict(client, inputs=["a", "b"]))
    unknown = f"pred-{0:032x}"
    before = totals(client)
    for wrong, status, slug, said in [
        ({"id": unknown, "label": "red"}, 404, "unknown-prediction", f"1.id: there is no prediction '{unknown}'"),
        ({"id": other, "label": "mauve"}, 422, "invalid-field", "1.label: 'mauve' is not among the choices"),
    ]:
        response = client.post("/feedback", json=[{"id": good, "label": "red"}, wrong])
        refused(response, status, slug, said, "no label of this request was stored")
    assert client.get(f"/predictions/{good}").json()["label"] is None
    assert {name: value for name, value in totals(client).items() if name.startswith("scalabl_outcomes_total")} == {
        name: value for name, value in before.items() if name.startswith("scalabl_outcomes_total")
    }


@pytest.mark.parametrize(
    ("body", "status", "slug", "said"),
    [
        ({"id": "pred-1", "label": "red"}, 404, "unknown-prediction", "id: there is no prediction 'pred-1'"),
        ({"id": "x" * 1000, "label": "red"}, 404, "unknown-prediction", f"'{'x' * 80}…'"),
        ({"id": "\x00", "label": "red"}, 404, "unknown-prediction", "'\\x00'"),
        ({"id": "pred-1"}, 422, "invalid-field", "label: Field required"),
        ([{"id": "pred-1", "label": 3}], 422, "invalid-field", "0.label: Input should be a valid string"),
        ({"id": "pred-1", "label": "a", "at": 1}, 422, "invalid-field", "at: Extra inputs"),
        ([], 422, "invalid-field", "body: List should have at least 1 item"),
        ("pred-1", 422, "invalid-field", "body: Input should be"),
        ([{"id": "pred-1", "label": "a"}] * 257, 422, "invalid-field", "257 labels are above the limit of 256"),
    ],
)
def test_bad_feedback_is_refused(client: TestClient, body: Any, status: int, slug: str, said: str) -> None:
    refused(client.post("/feedback", json=body), status, slug, said)


@pytest.mark.parametrize("label", ["\x00", "RED", "", "red ", "x" * 5000, "🙂"])
def test_a_label_is_a_choice_to_the_letter(client: TestClient, label: str) -> None:
    (answer,) = _predict(client, inputs="rose")
    response = client.post("/feedback", json={"id": answer["id"], "label": label})
    remedy = "if none of them is the true answer, send null"
    refused(response, 422, "invalid-field", "label: ", "'red', 'green', 'blue'", remedy)
    assert len(response.text) < 500


def test_a_lone_surrogate_is_a_wrong_field(client: TestClient) -> None:
    headers = {"content-type": "application/json"}
    body = b'{"id": "pred-1", "label": "\\ud800"}'
    assert client.post("/feedback", content=body, headers=headers).status_code in (404, 422)


@pytest.mark.parametrize("name", ["pred-1", f"pred-{0:032x}", "%00", "..", "pred-%F0%9F%99%82"])
def test_an_unknown_id_is_not_found(client: TestClient, name: str) -> None:
    assert client.get(f"/predictions/{name}").status_code == 404


def test_multiple_choice_labels_are_the_requests_choices(serve: Serve, url: str) -> None:
    client = serve("letters", outcomes_url=url)
    choices = [["one", "two\x00"], ["three", "four", "five"]]
    first, second = _predict(client, inputs=["a", "b"], choices=choices)
    assert _feedback(client, (first["id"], "two\x00"), (second["id"], "three")) == ["recorded", "recorded"]
    refused(client.post("/feedback", json={"id": first["id"], "label": "three"}), 422, "invalid-field", "'one'")
    refused(client.post("/feedback", json={"id": first["id"], "label": "A"}), 422, "invalid-field", "'one'")


def test_a_restart_keeps_predictions_labels_and_counters(folders: Path, url: str) -> None:
    settings = settings_for(folders, outcomes_url=url, replica_id="r")
    with serving(settings) as client:
        first, second = (answer["id"] for answer in _predict(client, inputs=["a", "b"]))
        _feedback(client, (first, "red"))
        before = totals(client)
    with serving(settings) as client:
        after = totals(client)
        kept = [name for name in before if name.startswith(("scalabl_outcomes", "scalabl_recorded")) and "_total" in name]
        assert before["scalabl_recorded_predictions_total"] == 2
        assert before["scalabl_outcomes_total"] == 1
        assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
        assert _feedback(client, (first, "red"), (second, "blue")) == ["unchanged", "recorded"]
        assert totals(client)["scalabl_outcomes_total"] == 2


def test_another_replica_resolves_the_id_and_counts_its_own_labels(folders: Path, url: str) -> None:
    with (
        serving(settings_for(folders, outcomes_url=url, replica_id="a")) as one,
        serving(settings_for(folders, outcomes_url=url, replica_id="b")) as other,
    ):
        (answer,) = _predict(one, inputs="rose")
        assert _feedback(other, (answer["id"], "red")) == ["recorded"]
        assert _feedback(one, (answer["id"], "red")) == ["unchanged"]
        assert _feedback(one, (answer["id"], "blue")) == ["corrected"]
        assert [totals(each)["scalabl_recorded_predictions_total"] for each in (one, other)] == [1, 0]
        assert [totals(each)["scalabl_outcomes_total"] for each in (one, other)] == [1, 1]
        assert [totals(each)["scalabl_outcomes_retracted_total"] for each in (one, other)] == [1, 0]


def test_the_oldest_make_room(serve: Serve, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scalabl_server.outcomes.writer.CHORE_SECONDS", 0.05)
    client = serve(outcomes_url=url, outcomes_max_rows=3)
    ids = [answer["id"] for answer in _predict(client, inputs=list("abcde"))]
    wait_until(lambda: client.get(f"/predictions/{ids[1]}").status_code == 404)
    assert [client.get(f"/predictions/{name}").status_code for name in ids] == [404, 404, 200, 200, 200]
    refused(client.post("/feedback", json={"id": ids[0], "label": "red"}), 404, "unknown-prediction", "has expired")
    assert _feedback(client, (ids[2], "red")) == ["recorded"]
    assert totals(client)["scalabl_recorded_predictions_total"] == 5
    assert totals(client)["scalabl_outcomes_deleted_total"] == 2


def test_without_outcomes_there_is_no_id_and_feedback_says_why(serve: Serve) -> None:
    client = serve(outcomes_url="none")
    (answer,) = _predict(client, inputs="rose")
    assert (answer["id"], answer["recorded"]) == (None, False)
    for response in (
        client.post("/feedback", json={"id": f"pred-{0:032x}", "label": "red"}),
        client.get(f"/predictions/pred-{0:032x}"),
    ):
        refused(response, 404, "outcomes-off", "--outcomes-url none")
    assert "scalabl_recorded_predictions_total" not in totals(client)


def test_the_routes_want_a_key(serve: Serve, url: str) -> None:
    client = serve(outcomes_url=url, api_keys="k")
    refused(client.post("/feedback", json={"id": "a", "label": "b"}), 401, "unauthorized")
    refused(client.get("/predictions/a"), 401, "unauthorized")


def test_feedback_needs_no_model(folders: Path, url: str) -> None:
    """Labels are accepted even while the model is loading or if it could not be loaded."""
    with serving(settings_for(folders, outcomes_url=url)) as client:
        (answer,) = _predict(client, inputs="rose")

    def fail(settings: ServeSettings) -> Any:
        raise RuntimeError("no model")

    app = create_app(settings_for(folders, outcomes_url=url), load=fail)
    with TestClient(app, raise_server_exceptions=False) as client:
        wait_until(lambda: client.get("/health/live").status_code == 503)
        assert _feedback(client, (answer["id"], "red")) == ["recorded"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"outcomes_url": "mysql://x"}, "mysql is not supported; use sqlite:"),
        ({"outcomes_url": "what"}, "is not a database URL"),
        ({"outcomes_url": "sqlite://"}, "needs the path of a file"),
        ({"outcomes_url": "sqlite:///:memory:"}, "needs the path of a file"),
        ({"data_dir": Path("/proc/nowhere")}, "cannot be created"),
    ],
)
def test_a_database_that_cannot_work_ends_the_start(folders: Path, changes: dict[str, Any], said: str) -> None:
    _start_fails(settings_for(folders, **changes), said)


def _start_fails(settings: ServeSettings, said: str) -> None:
    failures: list[Exception] = []
    with TestClient(create_app(settings, failures.append)) as client:
        wait_until(lambda: bool(failures))
        assert client.get("/health/live").status_code == 503
    assert said in str(failures[0])


def test_a_file_that_is_no_database_ends_the_start(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "x.db").write_text("something else, long enough to be read as a header " * 20)
    _start_fails(settings_for(folders, outcomes_url=f"sqlite:///{tmp_path / 'x.db'}"), "file is not a database")


def test_a_database_of_a_later_release_ends_the_start(folders: Path, url: str, tmp_path: Path) -> None:
    with serving(settings_for(folders, outcomes_url=url)):
        pass
    with closing(sqlite3.connect(tmp_path / "outcomes.db", isolation_level=None)) as connection:
        connection.execute("UPDATE scalabl_version SET version_num = '9999'")
    _start_fails(settings_for(folders, outcomes_url=url), "has version 9999, which this release does not know")


def test_a_locked_database_delays_one_answer_and_is_used_again_when_it_is_free(
    serve: Serve, url: str, tmp_path: Path
) -> None:
    client = serve(outcomes_url=url, outcomes_timeout=0.2)
    (before,) = _predict(client, inputs="rose")
    with closing(sqlite3.connect(tmp_path / "outcomes.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        (during,) = _predict(client, inputs="rose")
        assert (during["id"], during["recorded"]) == (None, False)
        assert during["probabilities"] == before["probabilities"]
        wait_until(lambda: totals(client)["scalabl_outcomes_up"] == 0)
        _unavailable(client.post("/feedback", json={"id": before["id"], "label": "red"}))
        assert totals(client)["scalabl_predictions_unrecorded_total"] == 1
        assert totals(client)["scalabl_recorded_predictions_total"] == 1
        other.execute("ROLLBACK")
    wait_until(lambda: totals(client)["scalabl_outcomes_up"] == 1)
    assert _feedback(client, (before["id"], "red")) == ["recorded"]
    (after,) = _predict(client, inputs="rose")
    assert client.get(f"/predictions/{after['id']}").status_code == 200


def test_a_request_does_not_wait_for_the_database_beyond_its_deadline(serve: Serve, url: str, tmp_path: Path) -> None:
    client = serve(outcomes_url=url, outcomes_timeout=30)
    _predict(client, inputs="rose")
    with closing(sqlite3.connect(tmp_path / "outcomes.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        answer = client.post("/predict", json={"inputs": "rose"}, headers={"x-request-timeout": "1"}).json()
        assert time.monotonic() - began < 10
        other.execute("ROLLBACK")
    assert answer["predictions"][0]["recorded"] is False


def test_a_prediction_that_cannot_be_stored_is_refused_where_outcomes_are_required(
    serve: Serve, url: str, tmp_path: Path
) -> None:
    client = serve(outcomes_url=url, outcomes_timeout=0.2, outcomes_required=True)
    with closing(sqlite3.connect(tmp_path / "outcomes.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        _unavailable(client.post("/predict", json={"inputs": "rose"}))
        other.execute("ROLLBACK")
    wait_until(lambda: client.post("/predict", json={"inputs": "rose"}).status_code == 200)


def _unavailable(response: httpx.Response) -> None:
    refused(response, 503, "outcomes-unavailable", "try again later")
    assert response.headers["retry-after"] == "1"
