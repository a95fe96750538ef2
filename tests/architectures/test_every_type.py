"""Every type that transformers' AutoModelForCausalLM maps: exact, refused by name, or not to be made tiny.

A few diverse types run with the other tests, all of them with `make check-architectures`.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from scalabl.errors import ScalaBLError
from tests.architectures.agreement import TOLERANCE, agreement_of
from tests.architectures.tiny_types import TYPES, tiny_config, tiny_model

# Encoders, flattened tokens, routed experts, states instead of keys and values, relative positions, a language tower.
FEW = ("bert", "bloom", "deepseek_v3", "gemma3", "mamba", "opt", "qwen2_moe", "qwen3_next")

# Types that generic tiny values do not make, on the versions that are tested; each with the reason that shows.
CANNOT_BE_MADE: dict[str, str] = {}

# Types whose base model is refused; each with a part of the message.
REFUSED: dict[str, str] = {}

FEWEST_EXACT = 150  # of all types; if an upgrade of transformers brings others, they may be refused, but not lost


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    kind: str
    result: str
    reason: str

    def __str__(self) -> str:
        return f"{self.kind:<26} {self.result:<15} {self.reason}"


def _examined(kind: str) -> Row:
    """Make a type's tiny model and compare it with its merged copies; any other error than a refusal is raised."""
    try:
        base = tiny_model(tiny_config(kind))
    except Exception as error:  # of a configuration that does not fit or a package that is missing
        return Row(kind, "cannot be made", f"{type(error).__name__}: {_first_line(error)}")
    try:
        agreement = agreement_of(base)
    except ScalaBLError as error:
        return Row(kind, "refused", _first_line(error))
    result = "exact" if agreement.error <= TOLERANCE else "WRONG"
    left_out = f"; without {', '.join(agreement.left_out)}" if agreement.left_out else ""
    return Row(kind, result, f"{', '.join(agreement.ways)} (largest difference {agreement.error:.0e}){left_out}")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")


@pytest.fixture(autouse=True)
def _warnings_of_architectures() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what transformers says of its own models is not what is tested
        yield


@pytest.mark.parametrize("kind", FEW)
def test_a_type_is_exact(kind: str) -> None:
    row = _examined(kind)
    assert row.result == "exact", row


@pytest.mark.architectures
def test_every_type_is_exact_or_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    rows = []
    with capsys.disabled():
        print(f"\n{Row('type', 'result', 'ways that agree with merged copies, or the reason')}")
        for kind in TYPES:
            rows.append(_examined(kind))
            print(rows[-1], flush=True)
        counts = Counter(row.result for row in rows)
        print(f"{len(rows)} types: " + ", ".join(f"{count} {result}" for result, count in counts.most_common()))
    assert [str(row) for row in rows if row.result == "WRONG"] == []
    unexpected = [
        str(row)
        for row in rows
        for known in [(CANNOT_BE_MADE if row.result == "cannot be made" else REFUSED).get(row.kind)]
        if row.result != "exact" and (known is None or known not in row.reason)
    ]
    assert unexpected == []
    assert counts["exact"] >= FEWEST_EXACT
