"""The running pass: entered once, left however it ends, and found again by layers that run in the backward pass."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scalabl.model.forward_pass import ForwardPass, RowSamples, checkpoint_contexts, enter, running
from scalabl.model.layer import SubspaceLinear
from scalabl.model.packing import Packing
from scalabl.model.posterior import Draws, draw
from scalabl.model.token_batch import TokenBatch
from scalabl.passes.probes import find_shared_work
from tests import tiny


def _pass(lengths: list[int], counts: list[int], **fields: Any) -> ForwardPass:
    inputs = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    samples = RowSamples(torch.zeros(1, 4), torch.zeros_like(inputs), inputs=inputs)
    return ForwardPass(torch.zeros(len(lengths), max(lengths)).long(), torch.tensor(lengths), samples, **fields)


def test_a_pass_within_a_pass_is_refused_and_the_first_goes_on() -> None:
    outer, inner = _pass([2], [1]), _pass([3], [1])
    with enter(outer):
        with pytest.raises(RuntimeError, match="cannot begin while another one runs"), enter(inner):
            raise AssertionError("it was entered")
        assert running() is outer
    assert running() is None


def test_nothing_runs_any_more_after_a_pass_that_failed() -> None:
    model = tiny.adapted()
    with pytest.raises(IndexError):
        model.logits(TokenBatch.of([[10_000_000]]), model.draws(2))
    assert running() is None
    assert model.logits(TokenBatch.of([[1]]), model.draws(2)).isfinite().all()


def test_each_thread_has_its_own_pass() -> None:
    both_entered = threading.Barrier(2)

    def see(forward_pass: ForwardPass) -> bool:
        with enter(forward_pass):
            both_entered.wait(10)
            return running() is forward_pass

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(see, [_pass([2], [1]), _pass([3], [1])])) == [True, True]


@pytest.mark.parametrize("in_blocks", [True, False], ids=["in the blocks", "at the head"])
@pytest.mark.parametrize("packs", [True, False], ids=["packed", "padded"])
def test_the_position_that_is_read_is_the_last_of_each_row(packs: bool, in_blocks: bool) -> None:
    lengths, counts = [2, 2, 5], [3, 1, 2]
    packing = Packing.of(torch.tensor(lengths), counts) if packs else None
    rows = [length for length, count in zip(lengths, counts, strict=True) for _ in range(count)] if in_blocks else lengths
    ends = torch.tensor(rows).cumsum(0) if packs else torch.tensor(rows)
    assert _pass(lengths, counts, packing=packing, spreads_in_blocks=in_blocks).last.tolist() == (ends - 1).tolist()


def test_a_layer_that_runs_again_in_the_backward_pass_runs_in_its_own_pass() -> None:
    layer = SubspaceLinear(nn.Linear(6, 5).requires_grad_(False), 4, 1.0, slice(0, 4))
    layer.reset_parameters(torch.Generator().manual_seed(0))
    nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(1))
    x = torch.randn(3, 2, 6, generator=torch.Generator().manual_seed(2))

    def gradient(run: Callable[[Tensor], Tensor]) -> Tensor:
        s = torch.randn(3, 4, generator=torch.Generator().manual_seed(3)).requires_grad_()
        with enter(ForwardPass(torch.zeros(3, 2).long(), torch.full((3,), 2), RowSamples(s, torch.arange(3)))):
            loss = run(x.clone().requires_grad_()).square().sum()
        loss.backward()  # when no pass runs any more
        assert running() is None
        assert s.grad is not None
        return s.grad

    again = gradient(lambda x: checkpoint(layer, x, use_reentrant=False, context_fn=checkpoint_contexts))
    assert torch.equal(again, gradient(layer))


def test_equal_draws_have_one_key_and_others_another() -> None:
    draws = draw(1, 8, 5)
    assert draws.part(2, 6).key == draw(1, 6, 5).part(2, 6).key  # the first six do not depend on how many there are
    assert draws.part(2, 6).part(1, 3).key == draws.part(3, 5).key
    different = (draws, draw(2, 8, 5), draw(1, 8, 5, "gaussian"), draw(1, 8, 6), draws.part(0, 4), draws.scaled(2.0))
    assert len({one.key for one in different}) == len(different)
    assert Draws(0, "gaussian", torch.ones(2, 3)).key == Draws(9, "sobol", torch.ones(2, 3)).key


def test_equal_draws_are_sampled_once_whichever_object_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.adapted()
    find_shared_work(model)
    sampled: list[int] = []
    sample = model.sample

    def spy(epsilon: Tensor, member: Tensor | None) -> Tensor:
        sampled.append(len(epsilon))
        return sample(epsilon, member)

    monkeypatch.setattr(model, "sample", spy)
    model.logits_each(TokenBatch.of([[1, 2], [3, 4], [5]]), [model.draws(4), model.draws(4), model.draws(4, seed=1)])
    assert sampled == [8]
