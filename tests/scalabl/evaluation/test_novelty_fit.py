"""The novelty reference of an adapter from its training rows."""

from __future__ import annotations

import torch

from scalabl.evaluation.encoded import EncodedSet
from scalabl.evaluation.novelty_fit import make_reference
from scalabl.passes.probes import find_shared_work
from scalabl.passes.trunk_cache import trunk_cache
from tests import tiny


def test_the_trunk_of_the_training_gives_the_same_reference_without_running_it() -> None:
    model = tiny.adapted("llama", layers_to_transform=(1,))
    find_shared_work(model.eval())
    sequences = tiny.ragged((5, 9, 3, 14, 7, 6, 8, 4, 11, 2))
    answers = torch.arange(len(sequences)) % 3
    rows = EncodedSet(sequences, answers, torch.full_like(answers, 3))
    cache = trunk_cache(model, sequences, 1.0)
    assert cache is not None
    expected = make_reference(model, rows, most_rows=8)
    runs: list[int] = []
    model.base.get_decoder().layers[0].mlp.register_forward_hook(lambda *_: runs.append(1))
    found = make_reference(model, rows, most_rows=8, trunk=cache)
    assert runs == [1], "for the test prompt alone"
    assert torch.allclose(found.rows @ found.rows.T, expected.rows @ expected.rows.T, atol=1e-3)
    assert torch.allclose(found.probe, expected.probe, atol=1e-3)
