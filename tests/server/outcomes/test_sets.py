"""Coverage and abstention counters of a calibrated adapter equal those computed from the answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from tests import tiny
from tests.server.cli.test_calibrate import calibrated  # noqa: F401  (a fixture)
from tests.server.conftest import serving, settings_for
from tests.server.outcomes.test_store import totals

COLOURS = list(tiny.CLASSIFICATION.choices)


@pytest.fixture
def client(calibrated: Path, folders: Path, tmp_path: Path) -> Iterator[TestClient]:  # noqa: F811
    settings = settings_for(folders, adapter=calibrated / "colours", num_samples=8, data_dir=tmp_path)
    with serving(settings) as made:
        yield made


def test_labels_of_calibrated_predictions_count_towards_their_coverage(client: TestClient) -> None:
    texts = ["xx", "yyyy", "w", "a text of another kind", "xyz", "?", "vvv", "uu", "zz"]
    answers = client.post("/predict", json={"inputs": texts, "coverage": 0.8}).json()["predictions"]
    labels = [*(COLOURS[n % 3] for n in range(len(answers) - 2)), None, None]
    given = [{"id": answer["id"], "label": label} for answer, label in zip(answers, labels, strict=True)]
    assert client.post("/feedback", json=given).status_code == 200
    counted = totals(client)
    assert counted["scalabl_outcomes_outside_total"] == counted["scalabl_outcomes_sets_outside_total"] == 2
    assert counted["scalabl_outcomes_abstained_outside_total"] == sum(answer["abstain"] for answer in answers[-2:])
    covered = [label in answer["prediction_set"]["labels"] for answer, label in zip(answers, labels, strict=True)]
    assert counted["scalabl_outcomes_covered_total"] == sum(covered) not in (0, len(answers))
    assert counted["scalabl_outcomes_sets_total"] == counted["scalabl_recorded_sets_total"] == len(answers)
    assert counted["scalabl_recorded_set_choices_total"] == sum(len(each["prediction_set"]["labels"]) for each in answers)
    assert counted["scalabl_outcomes_abstained_total"] == sum(answer["abstain"] for answer in answers)
    assert 'level="0.8"' in client.get("/metrics").text
