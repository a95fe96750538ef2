"""Answers with many choices are stored packed, and come back with the same choices, probabilities, set and scores."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from scalabl_server.outcomes import scoring
from scalabl_server.outcomes.stored_answers import MOST_ERRORS, MOST_PLAIN, from_text, to_text


def _answer(count: int) -> dict[str, Any]:
    """The stored part of an answer over `count` choices."""
    generator = random.Random(count)
    names = [f"intent {n}: where is my order, and why?" for n in range(count - 1)] + ["é\ud800"]
    weights = [generator.expovariate(1.0) for _ in names]
    probabilities = {name: weight / sum(weights) for name, weight in zip(names, weights, strict=True)}
    best = max(range(count), key=weights.__getitem__)
    return {
        "id": "pred-1",
        "prediction": names[best],
        "index": best,
        "confidence": probabilities[names[best]],
        "probabilities": probabilities,
        "entropy": 1.0,
        "standard_error": {"probabilities": dict.fromkeys(names, 0.01), "entropy": None},
        "prediction_set": {"labels": sorted(names, key=lambda name: -probabilities[name])[: count // 2], "coverage": 0.9},
    }


def test_an_answer_with_few_choices_is_stored_as_it_is() -> None:
    answer = _answer(MOST_PLAIN)
    assert json.loads(to_text(answer)) == answer == from_text(to_text(answer))


@pytest.mark.parametrize("count", [MOST_PLAIN + 1, 1000, 10_000])
def test_an_answer_with_many_choices_is_packed_and_comes_back(count: int) -> None:
    answer = _answer(count)
    text = to_text(answer)
    assert text.isascii()
    assert len(text) < 0.25 * len(json.dumps(answer))
    back = from_text(text)
    assert list(back["probabilities"]) == list(answer["probabilities"])
    assert back["probabilities"] == pytest.approx(answer["probabilities"], rel=1e-6)
    errors = back["standard_error"].pop("probabilities")
    best = sorted(answer["probabilities"], key=lambda name: -answer["probabilities"][name])[:MOST_ERRORS]
    assert errors == dict.fromkeys(best, 0.01)
    same = {**answer, "standard_error": {"entropy": None}, "probabilities": back["probabilities"]}
    assert back == same
    for label in (0, answer["index"], count - 1):
        assert scoring.of_label(back, label) == pytest.approx(scoring.of_label(answer, label), rel=1e-5)


def test_an_answer_without_errors_or_set_is_packed_too() -> None:
    answer = {**_answer(500), "prediction_set": None, "standard_error": {"probabilities": {}}}
    assert from_text(to_text(answer))["prediction_set"] is None
