"""A mixture of M members against M adapters of their own: the same logits, in one pass over the base model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scalabl.model.posterior import Draws, Posterior, draw, draw_members
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.model.token_batch import TokenBatch
from scalabl.passes.probes import find_shared_work
from tests import tiny

BATCH = TokenBatch.of(tiny.ragged())


def member_of(model: ScalaBLModel, member: int, name: str = "llama") -> ScalaBLModel:
    """One member of a mixture as an adapter of its own, on a base model of its own."""
    config = model.config.model_copy(update={"members": 1, "format_version": 1})
    alone = ScalaBLModel(tiny.base_model(name), config)
    with torch.no_grad():
        for parameter, of_all in zip(alone.adapter_parameters().values(), model.adapter_parameters().values(), strict=True):
            parameter.copy_(of_all[member])
    return alone.requires_grad_(False).eval()


@pytest.mark.parametrize("shortcuts", [False, True])
@pytest.mark.parametrize("num_samples", [3, 7])
@pytest.mark.parametrize("name", list(tiny.ARCHITECTURES))
def test_a_mixture_has_the_logits_of_its_members(name: str, num_samples: int, shortcuts: bool) -> None:
    model = tiny.mixture(name)
    if shortcuts:
        find_shared_work(model)
        assert model.trunk.verified
    draws = model.draws(num_samples, seed=5)
    logits = model.logits(BATCH, draws)
    for member in range(model.members):
        alone = member_of(model, member, name)
        own = draws.of_member(member)
        assert (logits[:, draws.member == member] - alone.logits(BATCH, own)).abs().max() <= 1e-5
        assert own.key == alone.draws(own.num_samples, seed=5 + member).key


def test_the_members_differ() -> None:
    model = tiny.mixture()
    logits = model.logits(BATCH, model.mean_draw())
    assert logits.shape == (4, 3, 3)
    assert (logits.std(1) > 0.05).all()


def test_inputs_with_draws_of_their_own_share_a_pass() -> None:
    model, sequences = tiny.mixture(), tiny.ragged()
    find_shared_work(model)
    shared = model.draws(6, seed=1)
    draws = [shared, model.draws(4, seed=2), shared.part(2, 5), model.draws(3).scaled(2.0)]
    together = model.logits_each(TokenBatch.of(sequences), draws)
    for sequence, own, logits in zip(sequences, draws, together, strict=True):
        assert (model.logits(TokenBatch.of([sequence]), own)[0] - logits).abs().max() <= 1e-5


@pytest.mark.parametrize("scheme", ["gaussian", "antithetic", "sobol"])
def test_draws_are_those_of_the_members_in_turn(scheme: Any) -> None:
    draws = draw_members(7, 11, 5, 3, scheme)
    assert draws.member.tolist() == [0, 1, 2] * 3 + [0, 1]
    for member, count in enumerate((4, 4, 3)):
        assert torch.equal(draws.epsilon[member::3], draw(7 + member, count, 5, scheme).epsilon)
    assert torch.equal(draw_members(7, 4, 5, 3, scheme).epsilon, draws.epsilon[:4])
    assert draw_members(7, 4, 5, 1, scheme).key == draw(7, 4, 5, scheme).key


def test_parts_keep_the_members_of_their_draws() -> None:
    draws = draw_members(0, 12, 5, 3)
    for part in (draws.part(2, 9), draws.scaled(0.5).part(2, 9), draws.part(1, 12).part(1, 8)):
        assert part.member.tolist() == [2, 0, 1, 2, 0, 1, 2]
    later = draws.part(4, 12)
    for member in range(3):
        assert later.of_member(member).key == draw(member, 4, 5).part(1 + (member == 0), 4).key


def test_draws_of_other_members_are_other_draws() -> None:
    epsilon = torch.ones(4, 5)
    keys = {Draws(0, "gaussian", epsilon, members=m, first_member=f).key for m, f in ((1, 0), (2, 0), (2, 1), (4, 0))}
    assert len(keys) == 4
    assert draw_members(0, 4, 5, 2).key != draw_members(0, 4, 5, 4).key


def test_fewer_samples_than_members_are_refused() -> None:
    with pytest.raises(ValueError, match=r"num_samples is 2, .* mixture of 3 members, .* use at least 3"):
        tiny.mixture().draws(2)


def test_the_posterior_samples_each_member() -> None:
    posterior = Posterior(torch.tensor([[0.0, 10.0], [100.0, 200.0]]), torch.tensor([[1.0, 2.0], [3.0, 4.0]]).log(), 2.0)
    s = posterior.sample(torch.tensor([[1.0, -1.0], [1.0, 1.0]]), torch.tensor([1, 0]))
    assert torch.allclose(s, torch.tensor([[106.0, 192.0], [2.0, 14.0]]))
    jacobian = torch.ones(2, 1, 2)  # of M members, one choice
    assert torch.allclose(posterior.by_deviations(jacobian), torch.tensor([[[2.0, 4.0]], [[6.0, 8.0]]]))


def test_each_member_is_linearised_at_its_mean() -> None:
    from scalabl.uncertainty.linearized import linearize

    model = tiny.mixture()
    linear = linearize(model, BATCH)
    for member in range(3):
        alone = linearize(member_of(model, member), BATCH)
        assert torch.allclose(linear.mean[:, member], alone.mean[:, 0], atol=1e-5)
        assert torch.allclose(linear.scaled_jacobian[:, member], alone.scaled_jacobian[:, 0], atol=1e-5)


def test_untrained_members_are_different_and_change_nothing() -> None:
    model = ScalaBLModel(tiny.base_model(), tiny.config_for(members=2, format_version=2))
    model.reset_adapter(seed=0)
    layer = model.adapted["lm_head"]
    assert not torch.equal(layer.lora_A[0], layer.lora_A[1])
    assert (model.logits(BATCH, model.draws(2))[:, 0] - model.base_logits(BATCH)).abs().max() <= 1e-6
