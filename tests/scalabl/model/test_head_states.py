"""The hidden states that a pass hands out are those that the head reads, averaged over the samples of each input."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scalabl.model.forward_pass import ForwardPass, Reading
from scalabl.model.token_batch import TokenBatch
from scalabl.passes.probes import find_shared_work
from scalabl.uncertainty.linearized import linearize
from tests import tiny
from tests.scalabl.model.test_scalabl_model import _merged

LENGTHS = (3, 9, 1, 14)


@pytest.mark.parametrize("name", list(tiny.ARCHITECTURES))
def test_they_are_those_of_models_with_merged_weights(name: str) -> None:
    model, sequences = tiny.adapted(name), tiny.ragged(LENGTHS)
    draws = model.draws(3, seed=3)
    with torch.no_grad():
        plain = [_merged(name, model, s) for s in model.sample(draws.epsilon)]
        expected = [
            torch.stack([m(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1][0, -1] for m in plain]).mean(0)
            for ids in sequences
        ]
    for finds in (False, True):  # padded, and then with every shortcut that this architecture allows
        if finds:
            find_shared_work(model)
        readings = model.readings(TokenBatch.of(sequences), [draws] * len(sequences))
        for reading, state in zip(readings, expected, strict=True):
            torch.testing.assert_close(reading.state, state, rtol=0, atol=1e-4)


def test_adapted_heads_alone_share_one_state_over_all_samples() -> None:
    model = tiny.adapted(target_modules=("lm_head",))
    find_shared_work(model)
    batch = TokenBatch.of(tiny.ragged(LENGTHS))
    many, mean = (model.readings(batch, [draws] * 4) for draws in (model.draws(5), model.mean_draw()))
    for one, other in zip(many, mean, strict=True):
        torch.testing.assert_close(one.state, other.state, rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, tiny.MIXTURE], ids=["one member", "mixture"])
def test_a_linearisation_has_the_state_at_the_posterior_mean(changes: dict[str, Any]) -> None:
    model, batch = tiny.adapted(**changes), TokenBatch.of(tiny.ragged(LENGTHS))
    linear = linearize(model, batch)
    assert linear.state is not None
    for row, reading in enumerate(model.readings(batch, [model.mean_draw()] * 4)):
        torch.testing.assert_close(linear.state[row], reading.state, rtol=0, atol=1e-5)
        assert linear.of_input(row).state is not None


def test_later_samples_count_by_their_number() -> None:
    first, later = Reading(torch.zeros(1, 2), torch.zeros(3)), Reading(torch.ones(3, 2), torch.ones(3))
    both = first.and_then(later)
    assert both.logits.shape == (4, 2)
    assert both.state.tolist() == pytest.approx([0.75] * 3)


def test_nobody_need_take_them() -> None:
    model = tiny.adapted()
    logits = model.run(ForwardPass(torch.tensor([[5, 6]]), torch.tensor([2])))
    assert logits.shape == (1, 3)
