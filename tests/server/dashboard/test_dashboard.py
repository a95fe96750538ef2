"""The dashboard's routes: page files and headers, data compared with a second derivation, states and limits."""

from __future__ import annotations

import math
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st
from scalabl_server.dashboard import summaries
from scalabl_server.dashboard.routes import KINDS, PAGE
from scalabl_server.outcomes import survey
from scalabl_server.outcomes.database import Database
from scalabl_server.outcomes.survey import Seen, read
from sqlalchemy import event

from scalabl.files.adapter_directory import read_config, save_config
from scalabl.uncertainty.selective import aurc
from tests.server.cli.test_calibrate import calibrated as calibrated_adapter  # noqa: F401  (a fixture)
from tests.server.conftest import serving, settings_for, wait_until
from tests.server.web.test_refusals import refused

Serve = Callable[..., TestClient]
Answers = list[dict[str, Any]]

COLOURS = ["red", "green", "blue"]
TEXTS = [letter * count for letter in "abcdefghijkl" for count in (1, 2, 3, 5, 8)]


def data_of(client: TestClient, adapter: str | None = None) -> dict[str, Any]:
    response = client.get("/v1/dashboard", params={} if adapter is None else {"adapter": adapter})
    assert response.status_code == 200, response.text
    return dict(response.json())


def predict(client: TestClient, texts: list[str], **more: Any) -> Answers:
    response = client.post("/predict", json={"inputs": texts} | more)
    assert response.status_code == 200, response.text
    return list(response.json()["predictions"])


def label(client: TestClient, answers: Answers, labels: Sequence[str | None]) -> None:
    given = [{"id": answer["id"], "label": name} for answer, name in zip(answers, labels, strict=True)]
    assert client.post("/feedback", json=given).status_code == 200


# The page and its files.


def test_the_page_comes_with_headers_that_let_it_load_its_own_files_only(colours: TestClient) -> None:
    for path in ("/dashboard", *(f"/dashboard/{file.name}" for file in PAGE.iterdir())):
        response = colours.get(path)
        assert response.status_code == 200
        assert response.headers["content-type"] == KINDS["." + path.rpartition(".")[2] if "." in path else ".html"]
        policy = dict(part.strip().partition(" ")[::2] for part in response.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == policy["form-action"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
        assert {policy[name] for name in ("script-src", "style-src", "img-src", "connect-src")} == {"'self'"}
        assert policy["require-trusted-types-for"] == "'script'"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["cache-control"] == "no-store"


def test_the_page_asks_for_nothing_that_the_policy_or_a_prefix_would_break() -> None:
    html = (PAGE / "index.html").read_text(encoding="utf-8")
    assert not re.findall(r"<style|\sstyle=|\son[a-z]+=|<script(?![^>]*\ssrc=)|<base", html)
    named = re.findall(r'(?:src|href)="([^"#]+)"', html)
    assert named
    names = {file.name for file in PAGE.iterdir()}
    for name in named:  # relative, so that a proxy may put the server below a path
        assert name.removeprefix("dashboard/") in names or name == "docs"
    for file in PAGE.iterdir():
        text = file.read_text(encoding="utf-8")
        assert not re.findall(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|new Function", text), file.name
        assert not [url for url in re.findall(r"https?://[^\s\"'`)]+", text) if url != "http://www.w3.org/2000/svg"]
        if file.suffix == ".js":
            for name in re.findall(r'from "\./([^"]+)"', text):
                assert name in names
            assert not re.findall(r'fetch\("/|ask\("/', text)


def test_every_file_of_the_page_is_package_data() -> None:
    settings = (Path(__file__).resolve().parents[3] / "pyproject.toml").read_text(encoding="utf-8")
    assert '"scalabl_server.dashboard" = ["page/*"]' in settings
    assert all(file.is_file() and file.suffix in KINDS for file in PAGE.iterdir())


def test_a_file_that_is_not_there_is_a_404(colours: TestClient) -> None:
    for name in ("nothing.js", "..%2froutes.py", "..", "index.html%00"):
        assert colours.get(f"/dashboard/{name}").status_code == 404
    refused(colours.get("/dashboard/nothing.js"), 404, "not-found", "no such file", "index.html")
    assert colours.post("/dashboard").status_code == 405


def test_the_page_needs_no_key_and_its_data_does(serve: Serve) -> None:
    client = serve(api_keys="ann:one")
    assert client.get("/dashboard").status_code == client.get("/dashboard/index.html").status_code == 200
    refused(client.get("/v1/dashboard"), 401, "unauthorized")
    assert client.get("/v1/dashboard", headers={"x-api-key": "one"}).status_code == 200


def test_without_the_flag_there_is_neither(serve: Serve) -> None:
    client = serve(dashboard=False)
    for path in ("/dashboard", "/dashboard/index.html", "/v1/dashboard"):
        refused(client.get(path), 404, "not-found", "is not a route")
    assert "/v1/dashboard" not in client.get("/openapi.json").json()["paths"]


def test_the_data_is_documented_with_a_schema(colours: TestClient) -> None:
    document = colours.get("/openapi.json").json()
    (operation,) = document["paths"]["/v1/dashboard"].values()
    assert operation["responses"]["200"]["content"]["application/json"]["schema"]["$ref"].endswith("/Dashboard")
    assert {"404", "503"} <= operation["responses"].keys()
    assert "/dashboard" not in document["paths"]


# Its data.


@pytest.fixture(scope="module")
def calibrated(calibrated_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811  (the fixture)
    """The calibrated adapter, with an abstention threshold that about half of its inputs exceed."""
    folder = tmp_path_factory.mktemp("abstains") / "colours"
    shutil.copytree(calibrated_adapter / "colours", folder)
    config = read_config(folder)
    assert config.calibration is not None
    assert config.calibration.abstain is not None
    median = config.calibration.quantiles["entropy"]["0.5"]
    rule = config.calibration.abstain.model_copy(update={"score": "entropy", "threshold": median})
    save_config(folder, config.model_copy(update={"calibration": config.calibration.model_copy(update={"abstain": rule})}))
    return folder.parent


@pytest.fixture(scope="module")
def client(calibrated: Path, folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    settings = settings_for(
        folders,
        adapter=calibrated / "colours",
        adapters=f"letters={folders / 'letters'},unused={folders / 'colours'}",
        num_samples=8,
        data_dir=tmp_path_factory.mktemp("kept"),
    )
    with serving(settings) as made:
        yield made


@pytest.fixture(scope="module")
def labelled(client: TestClient) -> tuple[Answers, list[str]]:
    """Predictions and their final labels. A third of them had another label first. Some other predictions are added."""
    answers = predict(client, TEXTS)
    labels = [COLOURS[(n * n) % 3] for n in range(len(answers))]
    label(client, answers[::3], [COLOURS[(COLOURS.index(each) + 1) % 3] for each in labels[::3]])
    label(client, answers, labels)
    label(client, answers, labels)  # changes nothing
    predict(client, ["another K"] * 7, num_samples=4)  # not as it was calibrated
    predict(client, ["who?"] * 5, adapter="letters", choices=["you", "me"])
    return answers, labels


@pytest.fixture
def stored(client: TestClient, labelled: tuple[Answers, list[str]]) -> dict[str, Any]:
    return dict(data_of(client)["stored"])


def test_the_reliability_diagram_is_that_of_the_answers_and_their_last_labels(
    labelled: tuple[Answers, list[str]], stored: dict[str, Any]
) -> None:
    answers, labels = labelled
    probabilities = np.array([list(answer["probabilities"].values()) for answer in answers])
    truth = np.array([COLOURS.index(each) for each in labels])
    confidence, hit = probabilities.max(1), probabilities.argmax(1) == truth
    assert 0 < hit.sum() < len(hit)
    for found in (stored["totals"]["reliability"], stored["recent"]):
        gaps = []
        for each in found["bins"]:
            inside = (confidence >= each["low"]) & ((confidence < each["high"]) | (each["high"] == 1))
            assert (each["accuracy"]["count"], each["accuracy"]["total"]) == (hit[inside].sum(), inside.sum())
            if inside.any():
                assert each["confidence"] == pytest.approx(confidence[inside].mean())
                gaps.append(abs(confidence[inside].mean() - hit[inside].mean()) * inside.mean())
            else:
                assert each["confidence"] is each["accuracy"]["share"] is each["accuracy"]["low"] is None
        assert found["ece"] == pytest.approx(sum(gaps))
        assert found["accuracy"]["share"] == pytest.approx(hit.mean())
        assert found["brier"] == pytest.approx(((probabilities - np.eye(3)[truth]) ** 2).sum(1).mean())
        assert found["log_loss"] == pytest.approx(-np.log(probabilities[np.arange(len(truth)), truth]).mean())
        covered = [name in answer["prediction_set"]["labels"] for answer, name in zip(answers, labels, strict=True)]
        (level,) = found["sets"]
        assert (level["coverage"], level["covered"]["count"], level["covered"]["total"]) == (0.9, sum(covered), len(covered))


def test_totals_are_those_of_the_adapter_alone(labelled: tuple[Answers, list[str]], stored: dict[str, Any]) -> None:
    answers, _ = labelled
    totals = stored["totals"]
    assert totals["predictions"] == len(answers) + 7
    abstained = sum(answer["abstain"] for answer in answers)
    assert (totals["abstained"]["count"], totals["abstained"]["total"]) == (abstained, len(answers) + 7)
    assert totals["set_sizes"] == {"0.9": pytest.approx(np.mean([len(a["prediction_set"]["labels"]) for a in answers]))}


def test_mutual_information_stands_against_the_calibration_sets(
    labelled: tuple[Answers, list[str]],
    stored: dict[str, Any],
    calibrated: Path,
) -> None:
    answers, _ = labelled
    values = np.array([answer["mutual_information"] for answer in answers])
    found, calibration = stored["mutual_information"], read_config(calibrated / "colours").calibration
    assert calibration is not None
    assert (found["count"], found["left_out"]) == (len(answers), 7)
    edges = np.array(found["edges"])
    np.testing.assert_allclose(edges, np.geomspace(1e-5, 10, 25))
    counts, _ = np.histogram(values, bins=np.concatenate([[-np.inf], edges, [np.inf]]))
    assert found["counts"] == counts.tolist()
    for name, value in found["quantiles"].items():
        assert value == pytest.approx(np.quantile(values, float(name)))
    assert found["calibration"] == pytest.approx(calibration.quantiles["mutual_information"])
    assert found["calibration_rows"] == calibration.data.threshold_rows
    assert [mark["probability"] for mark in found["marks"]] == [0.5, 0.9, 0.95, 0.99]
    for mark in found["marks"]:
        assert mark["value"] == calibration.quantiles["mutual_information"][f"{mark['probability']:g}"]
        assert mark["expected"] == pytest.approx(1 - mark["probability"])
        assert mark["above"]["count"] == (values > mark["value"]).sum()
    times = [datetime.fromisoformat(found[name]) for name in ("oldest", "newest")]
    assert times[0] <= times[1] <= datetime.now(UTC)


def test_the_risk_coverage_curves_are_those_of_the_labelled_answers(
    labelled: tuple[Answers, list[str]],
    stored: dict[str, Any],
    calibrated: Path,
) -> None:
    answers, labels = labelled
    found = stored["risk_coverage"]
    assert found["count"] == len(answers)
    wrong = np.array([answer["prediction"] != name for answer, name in zip(answers, labels, strict=True)])
    for score, curve in found["curves"].items():
        doubt = np.array([1 - answer[score] if score == "confidence" else answer[score] for answer in answers])
        assert len(curve) <= summaries.MOST_POINTS
        for point in curve:
            inside = doubt <= point["doubt"]
            assert point["coverage"] == pytest.approx(inside.mean())
            assert (point["wrong"]["count"], point["wrong"]["total"]) == (wrong[inside].sum(), inside.sum())
        assert curve[-1]["coverage"] == 1
        assert [point["coverage"] for point in curve] == sorted(point["coverage"] for point in curve)
    calibration = read_config(calibrated / "colours").calibration
    assert calibration is not None
    assert calibration.abstain is not None
    assert found["score"] == calibration.abstain.score
    kept = np.array([not answer["abstain"] for answer in answers])
    assert (found["rule"]["answered"]["count"], found["rule"]["answered"]["total"]) == (kept.sum(), len(kept))
    assert (found["rule"]["wrong"]["count"], found["rule"]["wrong"]["total"]) == (wrong[kept].sum(), kept.sum())


def test_the_newest_abstentions_are_there_to_be_labelled(
    labelled: tuple[Answers, list[str]], stored: dict[str, Any]
) -> None:
    answers, labels = labelled
    final = {answer["id"]: name for answer, name in zip(answers, labels, strict=True)}
    abstained = [answer for answer in reversed(answers) if answer["abstain"]]
    assert stored["abstains"] is True
    assert abstained
    assert [each["id"] for each in stored["doubtful"]] == [answer["id"] for answer in abstained[: survey.MOST_DOUBTFUL]]
    for found, answer in zip(stored["doubtful"], abstained, strict=False):
        for name in ("prediction", "confidence", "entropy", "mutual_information", "abstain"):
            assert found[name] == answer[name]
        assert (found["set_labels"], found["set_size"]) == (
            answer["prediction_set"]["labels"],
            len(answer["prediction_set"]["labels"]),
        )
        assert (found["label"], found["input"]) == (final[answer["id"]], None)


def test_an_adapter_without_a_calibration_shows_its_most_doubtful_predictions(
    client: TestClient, labelled: tuple[Answers, list[str]]
) -> None:
    made = predict(client, [f"which {n}?" for n in range(30)], adapter="letters", choices=["you", "me", "them"])
    found = data_of(client, "letters")["stored"]
    assert found["abstains"] is False
    most = sorted((answer["entropy"] for answer in made), reverse=True)[: survey.MOST_DOUBTFUL]
    assert [each["entropy"] for each in found["doubtful"]] == pytest.approx(most)
    assert {each["abstain"] for each in found["doubtful"]} == {each["set_labels"] for each in found["doubtful"]} == {None}
    information = found["mutual_information"]
    assert (information["count"], information["left_out"]) == (35, 0)
    assert information["calibration"] is information["calibration_rows"] is None
    assert information["marks"] == []
    assert (found["risk_coverage"]["score"], found["risk_coverage"]["rule"]) == ("entropy", None)


def test_an_adapter_that_was_never_asked_has_empty_figures(client: TestClient) -> None:
    found = data_of(client, "unused")
    assert found["adapter"] == "unused"
    stored = found["stored"]
    assert stored["totals"]["predictions"] == 0
    nothing = {"count": 0, "total": 0, "share": None, "low": None, "high": None}
    assert stored["totals"]["abstained"] == stored["recent"]["accuracy"] == nothing
    assert stored["recent"]["ece"] is stored["recent"]["brier"] is stored["recent"]["log_loss"] is None
    assert stored["mutual_information"]["oldest"] is None
    assert stored["mutual_information"]["quantiles"] == {}
    assert set(map(tuple, stored["risk_coverage"]["curves"].values())) == {()}
    assert stored["doubtful"] == []


def test_feedback_moves_the_diagram(serve: Serve, tmp_path: Path) -> None:
    client = serve(data_dir=tmp_path)
    (answer,) = predict(client, ["rose"])
    for name, correct in ((answer["prediction"], 1), (next(c for c in COLOURS if c != answer["prediction"]), 0)):
        label(client, [answer], [name])
        for found in (data_of(client)["stored"]["recent"], data_of(client)["stored"]["totals"]["reliability"]):
            assert (found["accuracy"]["count"], found["accuracy"]["total"]) == (correct, 1)
            assert [each["accuracy"]["total"] for each in found["bins"]].count(1) == 1


def test_truths_outside_the_choices_are_wrong_answers_with_shares_of_their_own(
    calibrated: Path, folders: Path, tmp_path: Path
) -> None:
    settings = settings_for(folders, adapter=calibrated / "colours", num_samples=8, data_dir=tmp_path)
    with serving(settings) as client:
        answers = predict(client, TEXTS[:30])
        labels = [None if n % 3 == 0 else answer["prediction"] if n % 3 == 1 else "red" for n, answer in enumerate(answers)]
        label(client, answers, labels)
        stored = data_of(client)["stored"]
    kept = [name for answer, name in zip(answers, labels, strict=True) if not answer["abstain"]]
    held = [name for answer, name in zip(answers, labels, strict=True) if answer["abstain"]]
    assert kept
    assert held
    pairs = list(zip(answers, labels, strict=True))
    losses = [-math.log(answer["probabilities"][name]) for answer, name in pairs if name is not None]
    for found in (stored["recent"], stored["totals"]["reliability"]):
        for share, names in ((found["outside"]["answered"], kept), (found["outside"]["abstained"], held)):
            assert (share["count"], share["total"]) == (names.count(None), len(names))
        right = sum(answer["prediction"] == name for answer, name in pairs)
        assert (found["accuracy"]["count"], found["accuracy"]["total"]) == (right, 30)
        assert found["log_loss"] == pytest.approx(np.mean(losses))
    rule = stored["risk_coverage"]["rule"]
    wrong = sum(answer["prediction"] != name for answer, name in pairs if not answer["abstain"])
    assert (rule["wrong"]["count"], rule["wrong"]["total"]) == (wrong, len(kept))
    names = dict(zip((answer["id"] for answer in answers), labels, strict=True))
    assert [(each["labelled"], each["label"]) for each in stored["doubtful"]] == [
        (True, names[each["id"]]) for each in stored["doubtful"]
    ]
    assert None in [each["label"] for each in stored["doubtful"]]


def test_where_every_truth_is_outside_there_is_no_log_loss(serve: Serve, tmp_path: Path) -> None:
    client = serve(data_dir=tmp_path)
    answers = predict(client, ["rose", "sky"])
    label(client, answers, [None, None])
    recent = data_of(client)["stored"]["recent"]
    assert (recent["log_loss"], recent["accuracy"]["count"], recent["accuracy"]["total"]) == (None, 0, 2)
    assert recent["brier"] > 1


def test_the_beginning_of_a_text_is_shown_where_texts_are_stored(serve: Serve, tmp_path: Path) -> None:
    client = serve(data_dir=tmp_path, store_inputs=True, max_input_tokens=400)
    text = "<b>bold</b> \x00 🙂 " + "x" * 300
    predict(client, [text])
    (found,) = data_of(client)["stored"]["doubtful"]
    assert found["input"] == text[: summaries.LONGEST_SHOWN] + "…"


# Its states.


def test_a_server_that_stores_nothing_says_so(serve: Serve) -> None:
    client = serve(outcomes_url="none")
    assert data_of(client) == {"adapter": "colours", "stored": None}


def test_an_unknown_adapter_is_a_404_with_the_names_that_there_are(client: TestClient) -> None:
    for name in ("nobody", "", "x" * 1000, "\x00", "../.."):
        refused(client.get("/v1/dashboard", params={"adapter": name}), 404, "unknown-adapter", "'colours', 'letters'")


def test_a_database_that_is_away_is_a_503_until_it_is_back(serve: Serve, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    client = serve(data_dir=folder, outcomes_timeout=1)
    predict(client, ["rose"])
    assert data_of(client)["stored"]["totals"]["predictions"] == 1
    folder.rename(tmp_path / "away")
    refused(client.get("/v1/dashboard"), 503, "outcomes-unavailable")
    assert not folder.exists()  # the reader makes no file in its place
    (tmp_path / "away").rename(folder)
    wait_until(lambda: client.get("/v1/dashboard").status_code == 200)
    assert data_of(client)["stored"]["totals"]["predictions"] == 1


# Its bounds.


@pytest.fixture
def file(client: TestClient, labelled: tuple[Answers, list[str]]) -> Path:
    return Path(str(client.app.state.lifetime.settings.data_dir)) / "outcomes.db"  # type: ignore[attr-defined]  # a FastAPI app


def test_the_lists_end_at_a_number_and_at_a_size(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = Database(f"sqlite:///{file}", 2, may_create=False)
    monkeypatch.setattr(survey, "MOST_ROWS", 20)
    with database.transaction(write=False) as connection:
        found = read(connection, "colours")
    assert len(found.recent) == len(found.labelled) == 20
    monkeypatch.setattr(survey, "MOST_CHARACTERS", 3 * len(str(found.labelled[0].answer)))
    with database.transaction(write=False) as connection:
        assert 1 <= len(read(connection, "colours").labelled) < 6
    monkeypatch.setattr(survey, "MOST_CHARACTERS", 1)
    with database.transaction(write=False) as connection:
        assert len(read(connection, "colours").recent) == 1  # one is always seen
    database.close()


def test_no_reading_walks_through_the_whole_table(file: Path) -> None:
    ran: list[tuple[str, Any]] = []
    database = Database(f"sqlite:///{file}", 2, may_create=False)
    with database.transaction(write=False) as connection:
        event.listen(connection, "before_cursor_execute", lambda *told: ran.append((told[2], told[3])))
        read(connection, "colours")
        queries = list(ran)
        assert len(queries) == 4
        plans = []
        for query, values in queries:
            rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {query}", values)
            plans.append(" ".join(row[3] for row in rows))
    database.close()
    for index in ("predictions_adapter", "predictions_labelled", "totals_adapter"):
        assert any(f"USING INDEX scalabl_{index} (adapter=?)" in plan for plan in plans)
    assert all(plan.startswith("SEARCH ") for plan in plans)
    assert not [plan for plan in plans if "FOR ORDER BY" in plan]


def test_a_database_of_the_release_before_gets_the_indexes_and_keeps_its_rows(file: Path, tmp_path: Path) -> None:
    old = tmp_path / "old.db"
    with closing(sqlite3.connect(file)) as source, closing(sqlite3.connect(old)) as copy:
        source.backup(copy)
        for index in ("predictions_adapter", "predictions_labelled", "totals_adapter"):
            copy.execute(f"DROP INDEX scalabl_{index}")
        copy.execute("UPDATE scalabl_version SET version_num = '0001'")
        copy.commit()
        rows = copy.execute("SELECT * FROM scalabl_predictions ORDER BY seq").fetchall()
    database = Database(f"sqlite:///{old}", 2)
    with database.transaction(write=False) as connection:
        assert connection.exec_driver_sql("SELECT version_num FROM scalabl_version").scalar() == "0003"
        assert [tuple(row) for row in connection.exec_driver_sql("SELECT * FROM scalabl_predictions ORDER BY seq")] == rows
        names = connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'index'").scalars().all()
        assert {"scalabl_predictions_adapter", "scalabl_predictions_labelled", "scalabl_totals_adapter"} <= set(names)
    database.close()


# The formulas.


@given(st.integers(1, 5000).flatmap(lambda total: st.tuples(st.integers(0, total), st.just(total))))
def test_wilsons_interval_ends_where_the_score_test_does(trial: tuple[int, int]) -> None:
    count, total = trial
    found = summaries.share(count, total)
    assert found.share is not None
    assert found.low is not None
    assert found.high is not None
    assert 0 <= found.low <= found.share <= found.high <= 1
    for end in {found.low, found.high} - {0.0, 1.0}:
        score = abs(found.share - end) / math.sqrt(end * (1 - end) / total)
        assert score == pytest.approx(1.959964, abs=1e-5)
    assert (found.low == 0) is (count == 0)
    assert (found.high == 1) is (count == total)


def test_wilsons_interval_of_a_textbook() -> None:
    found = summaries.share(81, 263)  # Newcombe 1998, table I
    assert (found.low, found.high) == (pytest.approx(0.2553, abs=5e-5), pytest.approx(0.3662, abs=5e-5))


seen = st.builds(
    lambda doubt, label: Seen(
        "i", 0.0, {"entropy": doubt, "mutual_information": doubt, "confidence": 1 - doubt, "index": 0}, label
    ),
    st.sampled_from([n / 16 for n in range(16)]),
    st.integers(0, 1),
)


@given(st.lists(seen, min_size=1, max_size=50))
def test_the_area_under_a_whole_curve_is_that_of_the_evaluation(labelled: list[Seen]) -> None:
    found = summaries.risk_coverage(labelled, None)
    doubt = torch.tensor([each.answer["entropy"] for each in labelled], dtype=torch.float64)
    wrong = torch.tensor([each.label != 0 for each in labelled])
    for curve in found.curves.values():
        steps = np.diff([0.0, *(point.coverage for point in curve)])
        risks = [point.wrong.share for point in curve]
        assert float(np.dot(steps, risks)) == pytest.approx(aurc(doubt, wrong))
