"""`/v1/dashboard` of two replicas on one PostgreSQL: both return all data, also after a database migration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.integration.support.process import write_models
from tests.integration.support.replicas import Replica, postgres, running

pytestmark = pytest.mark.integration

INDEXES = ("scalabl_predictions_adapter", "scalabl_predictions_labelled", "scalabl_totals_adapter")


def _data(replica: Replica) -> dict[str, Any]:
    response = replica.client.get("/v1/dashboard")
    assert response.status_code == 200, response.text
    return dict(response.json()["stored"])


def test_both_replicas_tell_the_sum_and_an_old_database_gets_its_indexes(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    with postgres() as database:
        replicas = [Replica(models, name, database.url) for name in "ab"]
        with running(*replicas):
            answers_by_replica = [replica.predict([f"rose {n}" for n in range(60)]) for replica in replicas]
            labels = [(answer["id"], "red") for answers in answers_by_replica for answer in answers[:40]]
            assert replicas[0].feedback(labels).status_code == 200
            right = sum(answer["prediction"] == "red" for answers in answers_by_replica for answer in answers[:40])
            data = [_data(replica) for replica in replicas]
            assert data[0] == data[1]
            totals = data[0]["totals"]
            assert totals["predictions"] == 120
            for reliability in (totals["reliability"], data[0]["recent"]):
                assert (reliability["accuracy"]["count"], reliability["accuracy"]["total"]) == (right, 80)
            assert data[0]["risk_coverage"]["count"] == 80
            assert data[0]["mutual_information"]["count"] == 120
            replicas[0].kill()
            with psycopg.connect(database.url, autocommit=True) as connection:
                for index in INDEXES:
                    connection.execute(f"DROP INDEX {index}")
                connection.execute("UPDATE scalabl_version SET version_num = '0001'")
                replicas[0].start()  # beside the other one, which goes on
                replicas[0].wait()
                assert _data(replicas[0]) == _data(replicas[1]) == data[0]
                names = {name for (name,) in connection.execute("SELECT indexname FROM pg_indexes")}
                assert set(INDEXES) <= names
