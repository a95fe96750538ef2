"""The dashboard's figure of novelty: the distribution of p-values, and what it says where there are none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from scalabl_server.dashboard.novelty import NoveltyRule, traffic_novelty
from scalabl_server.outcomes.survey import Seen

from tests import tiny
from tests.server.conftest import serving, settings_for

RULE = NoveltyRule(level=0.05, calibration_rows=99, highest_log10=0.5)


def seen(*p_values: float | None) -> list[Seen]:
    """Predictions with these p-values, newest first; None: made before the adapter had a reference."""
    answers: list[dict[str, Any]] = [{} if p is None else {"novelty": {"p_value": p, "score": 0.0}} for p in p_values]
    return [Seen(str(place), 1000.0 - place, answer, None) for place, answer in enumerate(answers)]


def test_p_values_are_counted_in_bins_that_include_their_upper_edge() -> None:
    found = traffic_novelty(seen(0.01, 0.05, 0.0501, 0.5, 1.0, None), RULE)
    assert found is not None
    assert {index: number for index, number in enumerate(found.counts) if number} == {0: 2, 1: 1, 9: 1, 19: 1}
    assert (found.count, found.left_out) == (5, 1)
    assert (found.novel.count, found.novel.total) == (2, 5)
    assert found.newest is not None
    assert found.oldest is not None
    assert (found.newest - found.oldest).total_seconds() == 4


def test_without_p_values_it_is_empty_and_without_a_reference_there_is_none() -> None:
    found = traffic_novelty(seen(None, None), RULE)
    assert found is not None
    assert (found.count, found.left_out, found.oldest, found.novel.share) == (0, 2, None, None)
    assert traffic_novelty(seen(0.5), None) is None


@pytest.fixture(scope="module")
def client(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    work = tmp_path_factory.mktemp("novelty") / "served"
    shutil.copytree(folders, work)
    tiny.add_novelty(work / "colours", level=0.2)
    settings = settings_for(work, adapters=f"letters={work / 'letters'}", data_dir=work / "data")
    with serving(settings) as made:
        yield made


def data_of(client: TestClient, adapter: str) -> dict[str, Any]:
    stored = client.get("/v1/dashboard", params={"adapter": adapter}).json()["stored"]
    assert stored is not None
    return dict(stored)


def test_the_page_gets_the_stored_p_values(client: TestClient) -> None:
    texts = [letter * length for letter in "abcdef" for length in (1, 3, 9)]
    answers = client.post("/predict", json={"inputs": texts}).json()["predictions"]
    found = data_of(client, "colours")["novelty"]
    assert found["count"] == sum(found["counts"]) == len(texts)
    assert found["novel"]["count"] == sum("novel" in answer["abstain_reason"] for answer in answers)
    assert (found["level"], found["calibration_rows"], found["left_out"]) == (0.2, 40, 0)
    assert found["highest_log10"] > 0


def test_the_page_is_told_that_an_adapter_has_none(client: TestClient) -> None:
    assert data_of(client, "letters")["novelty"] is None
