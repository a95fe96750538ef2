"""Passes over one batch, round after round: the numbers of passes of their own, without their common work."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scalabl.evaluation.encoded import EncodedSet
from scalabl.evaluation.inference import adaptive_predictive
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.model.token_batch import TokenBatch
from scalabl.passes.probes import find_shared_work
from scalabl.passes.rounds import Rounds
from scalabl.uncertainty.adaptive import Rule
from tests import tiny

SEQUENCES = dict(enumerate(tiny.ragged((3, 9, 1, 14))))


def _passes_of(model: ScalaBLModel, block: int) -> list[int]:
    """Hears in which passes a decoder block's attention computes anything, and how many tokens; not where it is skipped."""
    seen: list[int] = []
    blocks = next(m for m in model.base.modules() if isinstance(m, nn.ModuleList))
    blocks[block].self_attn.register_forward_hook(lambda _, args, output: seen.append(output[0].shape[:2].numel()))
    return seen


@pytest.mark.parametrize("changes", [{}, {"layers_to_transform": (1,)}, {"target_modules": ("lm_head",)}], ids=str)
def test_rounds_give_what_passes_of_their_own_give(changes: dict[str, object]) -> None:
    model, plain = tiny.adapted(**changes), tiny.adapted(**changes)
    find_shared_work(model)
    whole = model.draws(8, seed=2)
    rounds = Rounds(model, SEQUENCES, dict.fromkeys(SEQUENCES, whole), keeps_trunk=True)
    for going, start, stop in (([0, 1, 2, 3], 0, 2), ([1, 3], 2, 4), ([2], 4, 8), ([0], 2, 3)):
        part = whole.part(start, stop)
        found = rounds.readings(dict.fromkeys(going, part))
        assert list(found) == going
        expected = plain.readings(TokenBatch.of([SEQUENCES[index] for index in going]), [part] * len(going))
        for reading, other in zip(found.values(), expected, strict=True):
            torch.testing.assert_close(reading.logits, other.logits, rtol=0, atol=1e-5)
            torch.testing.assert_close(reading.state, other.state, rtol=0, atol=1e-4)


def test_the_trunk_runs_once_for_all_rounds() -> None:
    model = tiny.adapted(layers_to_transform=(1,))
    find_shared_work(model)
    trunk, after = _passes_of(model, 0), _passes_of(model, 1)
    draws = model.draws(8)
    rounds = Rounds(model, SEQUENCES, dict.fromkeys(SEQUENCES, draws), keeps_trunk=True)
    rounds.readings(dict.fromkeys(SEQUENCES, draws.part(0, 2)))
    rounds.readings(dict.fromkeys([1, 3], draws.part(2, 8)))
    assert (len(trunk), len(after)) == (1, 2)


def test_a_data_sets_trunk_runs_once_where_its_states_fit() -> None:
    model = tiny.adapted(task=tiny.MULTIPLE_CHOICE, layers_to_transform=(1,))
    find_shared_work(model)
    encoded = EncodedSet(tiny.ragged([3 + n % 11 for n in range(12)]), torch.zeros(12), torch.tensor([2, 4, 3, 4] * 3))
    trunk, after = _passes_of(model, 0), _passes_of(model, 1)
    draws = model.draws(64, 5)
    kept = adaptive_predictive(model, encoded, draws, Rule())
    assert len(trunk) == 1 < len(after)
    again = adaptive_predictive(model, encoded, draws, Rule(), trunk_gib=0)
    assert len(trunk) == 1 + len(after) / 2
    for one, other in zip(kept, again, strict=True):
        assert one.num_samples == other.num_samples
        assert (one.outcome.probabilities - other.outcome.probabilities).abs().max() <= 1e-5
