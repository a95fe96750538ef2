"""Every type that transformers' AutoModelForCausalLM maps: exact, refused by name, or not to be made tiny.

A few diverse types run with the other tests, all of them with `make check-architectures`.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from scalabl.errors import ScalaBLError
from tests.architectures.agreement import TOLERANCE, agreement_of
from tests.architectures.tiny_types import TYPES, tiny_config, tiny_model

# An encoder, relative positions, latent attention with routed experts, a language tower, states instead of keys and values,
# and layers that get the tokens of all inputs in one dimension.
FEW = ("bert", "bloom", "deepseek_v3", "gemma3", "mamba", "opt", "qwen2_moe")

# Types that generic tiny values do not make, on the versions that are tested; each with the reason that shows.
CANNOT_BE_MADE: dict[str, str] = {
    "blt": "shapes cannot be multiplied",
    "dbrx": "has no attribute 'rope_theta'",
    "dots3_note": "Class validation error",
    "gemma3n": "requires the timm library",
    "gemma4_assistant": "Class validation error",
    "gemma4_unified_assistant": "The set of layer types producing a cache is different",
    "musicgen": "'MusicgenConfig' object has no attribute",
    "musicgen_melody": "'MusicgenMelodyConfig' object has no attribute",
}

# Types whose base model is refused; each with a part of the message.
REFUSED: dict[str, str] = {
    "cpmant": "the base model CpmAntForCausalLM answers an input differently when longer inputs are beside it",  # pads left
    "prophetnet": "the base model ProphetNetForCausalLM cannot be run on token ids alone",  # its head gets several streams
    "xlnet": "the base model XLNetLMHeadModel answers an input differently when longer inputs are beside it",
}

FEWEST_EXACT = 170  # of all types; if an upgrade of transformers brings others, they may be refused, but not lost


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    kind: str
    result: str
    reason: str

    def __str__(self) -> str:
        return f"{self.kind:<26} {self.result:<15} {self.reason}"


def _examined(kind: str) -> Row:
    """Make a type's tiny model, and compare an adapter on it with merged copies; other errors than refusals are raised."""
    try:
        base = tiny_model(tiny_config(kind))
        base(input_ids=torch.tensor([[3, 4, 5]]), use_cache=False)
    except Exception as error:  # of a configuration that does not fit, a package that is missing, or the architecture itself
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
    expected = {"cannot be made": CANNOT_BE_MADE, "refused": REFUSED, "exact": dict.fromkeys(TYPES, "")}
    assert [str(row) for row in rows if expected[row.result].get(row.kind, "another result") not in row.reason] == []
    assert counts["exact"] >= FEWEST_EXACT
