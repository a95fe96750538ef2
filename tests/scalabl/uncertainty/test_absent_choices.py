"""Choices that an input lacks get no probability, and the others keep their proportions."""

from __future__ import annotations

import torch

from scalabl.uncertainty.absent_choices import without_absent
from scalabl.uncertainty.predictive import predictive


def test_only_the_choices_beyond_each_inputs_own_are_put_out_of_reach() -> None:
    logits = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))
    counts = torch.tensor([2, 4, 3])
    cut = without_absent(logits, counts)
    for index, count in enumerate(counts.tolist()):
        assert torch.equal(cut[index, :, :count], logits[index, :, :count])
        assert not predictive(cut[index : index + 1], temperature=10.0).probabilities[0, count:].any()
