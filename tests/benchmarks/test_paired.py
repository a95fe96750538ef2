"""The paired differences of two methods on the same queries, against differences that are known."""

from __future__ import annotations

import pytest
import torch

from benchmarks.results.paired import paired_differences
from scalabl.uncertainty.predictive import Predictive, predictive


def _outcome(logits: torch.Tensor) -> Predictive:
    return predictive(logits.unsqueeze(1))


def test_a_method_beside_itself_differs_by_nothing() -> None:
    logits = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    answers = torch.arange(50) % 3
    found = paired_differences([(_outcome(logits), _outcome(logits))], answers)
    assert {name: tuple(values.values()) for name, values in found.items()} == {"nll": (0, 0, 0), "ece": (0, 0, 0)}


def test_what_both_share_does_not_widen_the_interval() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = 4 * torch.randn(400, 3, generator=generator)
    answers = torch.randint(3, (400,), generator=generator)
    worse = logits.clone()
    worse[torch.arange(400), answers] -= 0.1
    first, second = _outcome(logits), _outcome(worse)
    nll = paired_differences([(first, second)], answers)["nll"]
    expected = torch.nn.functional.cross_entropy(worse, answers) - torch.nn.functional.cross_entropy(logits, answers)
    assert nll["difference"] == pytest.approx(float(expected), rel=1e-4)
    assert 0 < nll["low"] < nll["difference"] < nll["high"]
    alone = torch.nn.functional.cross_entropy(logits, answers, reduction="none").std() / 20
    assert nll["high"] - nll["low"] < 0.2 * float(alone)
