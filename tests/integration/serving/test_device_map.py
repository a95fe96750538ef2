"""A server whose base model is split by a device map, with one block on disk, answers like an unsplit one."""

from __future__ import annotations

import json
from pathlib import Path

import httpx
import pytest

from tests.integration.support.process import served, write_models

pytestmark = pytest.mark.integration

PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
ON_DISK = ("model.layers.0",)
INPUTS = ["a red apple", "the sky above", "grass after the rain"]


def test_the_answers_are_those_of_a_base_in_one_piece(tmp_path: Path) -> None:
    folder = write_models(tmp_path)
    where = tmp_path / "map.json"
    where.write_text(json.dumps({part: "disk" if part in ON_DISK else "cpu" for part in PARTS}), encoding="utf-8")
    answers = []
    for settings in ({}, {"device": "auto", "device_map": where}):
        with served(folder, **settings) as server:
            probabilities = []
            for method in ({"method": "monte_carlo", "num_samples": 6}, {"method": "linearized"}):
                response = httpx.post(f"{server.url}/predict", json={"inputs": INPUTS, **method}, timeout=60)
                assert response.status_code == 200, response.text
                probabilities += [
                    list(prediction["probabilities"].values()) for prediction in response.json()["predictions"]
                ]
            answers.append(probabilities)
            assert server.stop() == 0
    for one, other in zip(*answers, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
