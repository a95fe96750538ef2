"""The text that the database stores for an answer: its JSON, or a packed form of it where there are many choices.

The packed form is self-contained. Names of choices are compressed, probabilities are float32, the prediction set has
positions, and standard errors are those of the most probable choices only.
"""

from __future__ import annotations

import json
import zlib
from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

MOST_PLAIN = 256  # choices of an answer that is stored as it is
MOST_ERRORS = 16  # standard errors of probabilities that a packed answer has

Answer = dict[str, Any]


def to_text(answer: Mapping[str, Any]) -> str:
    """The text of an answer: its JSON, packed if it has more than `MOST_PLAIN` choices."""
    return json.dumps(answer if len(answer["probabilities"]) <= MOST_PLAIN else _packed(answer), separators=(",", ":"))


def from_text(text: str) -> Answer:
    """The answer of a text that `to_text` wrote, its choices in the same order."""
    answer: Answer = json.loads(text)
    return _unpacked(answer) if "packed" in answer else answer


def _packed(answer: Mapping[str, Any]) -> Answer:
    names = tuple(answer["probabilities"])
    values = np.fromiter(answer["probabilities"].values(), dtype="<f4", count=len(names))
    packed: Answer = {**answer, "packed": {"choices": _compressed(names), "probabilities": _base64(values.tobytes())}}
    del packed["probabilities"]
    errors = answer["standard_error"]
    if len(errors["probabilities"]) > MOST_ERRORS:
        top = [names[index] for index in np.argsort(-values, kind="stable")[:MOST_ERRORS]]
        known = errors["probabilities"]
        packed["standard_error"] = {**errors, "probabilities": {name: known[name] for name in top if name in known}}
    members = answer.get("prediction_set")
    if members is not None:
        positions = {name: index for index, name in enumerate(names)}
        places = np.array([positions[label] for label in members["labels"]], dtype="<u4")
        packed["prediction_set"] = {**members, "labels": _base64(zlib.compress(places.tobytes()))}
    return packed


def _unpacked(packed: Answer) -> Answer:
    parts = packed.pop("packed")
    names: list[str] = json.loads(zlib.decompress(b64decode(parts["choices"])))
    values = np.frombuffer(b64decode(parts["probabilities"]), dtype="<f4").tolist()
    members = packed.get("prediction_set")
    if members is not None:
        places = np.frombuffer(zlib.decompress(b64decode(members["labels"])), dtype="<u4")
        members["labels"] = [names[place] for place in places]
    return {**packed, "probabilities": dict(zip(names, values, strict=True))}


@lru_cache(maxsize=16)
def _compressed(names: Sequence[str]) -> str:
    """The names as text; an adapter's answers all have the same, so they are rarely compressed again."""
    return _base64(zlib.compress(json.dumps(names).encode()))


def _base64(content: bytes) -> str:
    return b64encode(content).decode("ascii")
