"""The adapted layer around every kind of linear layer, its initialisation, and the cut head."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from scalabl.model.forward_pass import ForwardPass, RowSamples, enter
from scalabl.model.head import ChoiceHead, cut_head
from scalabl.model.layer import SubspaceLinear

RANK, SCALING = 4, 2.0


def _adapted(base: nn.Module) -> SubspaceLinear:
    layer = SubspaceLinear(base, RANK, SCALING, slice(2, 2 + RANK))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        layer.lora_A.normal_(generator=generator)
        layer.lora_B.normal_(generator=generator)
    return layer


def _in_a_pass(rows: RowSamples) -> enter:
    count = len(rows.sample)
    return enter(ForwardPass(torch.zeros(count, 1, dtype=torch.int64), torch.ones(count, dtype=torch.int64), rows))


def _expected_delta(layer: SubspaceLinear, x: Tensor, rows: RowSamples) -> Tensor:
    s = rows.s[rows.sample, 2 : 2 + RANK]
    return torch.stack([x_row @ layer.delta_weight(s_row).T for x_row, s_row in zip(x, s, strict=True)])


def _linear(bias: bool) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(32, 64, bias=bias)


def _conv1d(bias: bool) -> Conv1D:
    torch.manual_seed(0)
    return Conv1D(64, 32)


def _quantised(bits: int) -> nn.Module:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    if bits == 8:
        made = bitsandbytes.nn.Linear8bitLt(32, 64, has_fp16_weights=False)
    else:
        made = bitsandbytes.nn.Linear4bit(32, 64, compute_dtype=torch.float32)
    made.load_state_dict(_linear(True).state_dict())
    return made.to("cpu")


@pytest.mark.parametrize(
    "make",
    [lambda: _linear(True), lambda: _linear(False), lambda: _conv1d(True), lambda: _quantised(8), lambda: _quantised(4)],
    ids=["bias", "no bias", "Conv1D", "8 bit", "4 bit"],
)
def test_each_row_gets_its_own_samples_part_on_top_of_the_base_layer(make: Any) -> None:
    base = make().requires_grad_(False)
    layer = _adapted(base)
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(2))
    rows = RowSamples(torch.randn(6, 8, generator=torch.Generator().manual_seed(3)), torch.tensor([5, 0, 2]))
    with torch.inference_mode():
        plain = layer(x)
        with _in_a_pass(rows):
            adapted = layer(x)
        assert torch.equal(plain, base(x)), "without samples it is the base layer"
        assert (adapted - plain - _expected_delta(layer, x, rows)).abs().max() <= 2e-5


def test_with_gradients_the_base_output_is_left_alone() -> None:
    layer = _adapted(_linear(True))
    rows = RowSamples(torch.randn(6, 8, requires_grad=True), torch.tensor([1, 4]))
    with _in_a_pass(rows):
        layer(torch.randn(2, 32)).sum().backward()
    assert layer.lora_A.grad is not None
    assert layer.lora_B.grad is not None
    assert rows.s.grad is not None
    assert (rows.s.grad != 0).nonzero().unique(dim=0).shape[0] == 2 * RANK, "only its own rows and columns"


def test_the_start_is_the_papers() -> None:
    layer = _adapted(nn.Linear(200, 16))
    layer.reset_parameters(torch.Generator().manual_seed(0), std_init=0.05)
    assert torch.allclose(layer.lora_A @ layer.lora_A.T, torch.eye(RANK), atol=1e-5)
    assert torch.equal(layer.s_mean, layer.s_mean.sort(descending=True).values)
    # A Kaiming matrix with a = sqrt 5 has entries U(-1/sqrt(d), 1/sqrt(d)): the squared singular values sum to about R / 3.
    assert layer.s_mean.square().sum().item() == pytest.approx(RANK / 3, rel=0.15)
    assert (layer.lora_B == 0).all()
    sigma = layer.s_log_std.exp()
    assert (sigma >= 0.05 / math.sqrt(2)).all()
    assert (sigma <= 0.05).all()


def test_a_rank_above_the_width_leaves_the_surplus_at_zero() -> None:
    layer = SubspaceLinear(nn.Linear(3, 5), 6, 1.0, slice(0, 6))
    layer.reset_parameters(torch.Generator().manual_seed(0))
    assert (layer.s_mean[:3] > 0).all()
    assert (layer.s_mean[3:] == 0).all()
    assert (layer.lora_A[3:] == 0).all()
    assert torch.isfinite(layer.s_log_std).all()


@pytest.mark.parametrize("bias", [True, False])
def test_a_cut_head_gives_the_logits_of_its_tokens(bias: bool) -> None:
    head, tokens = nn.Linear(8, 30, bias=bias), (7, 29, 0)
    cut = cut_head(head, tokens)
    hidden = torch.randn(5, 8)
    assert torch.allclose(cut(hidden), head(hidden)[:, list(tokens)], atol=1e-6)
    assert not any(parameter.requires_grad for parameter in cut.parameters())
    assert cut.weight.data_ptr() != head.weight.data_ptr()


def test_a_head_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="choice token 30 is outside the base model's vocabulary of 30"):
        cut_head(nn.Linear(8, 30), (7, 30))
    with pytest.raises(ValueError, match="the head's weight is quantised; load the base model with its head in floating"):
        cut_head(_quantised(4), (1, 2))


def test_the_choice_head_reads_each_rows_last_position() -> None:
    head = ChoiceHead(nn.Identity())
    hidden = torch.randn(3, 6, 4)
    with pytest.raises(RuntimeError, match="run the model through ScalaBLModel"):
        head(hidden)
    with enter(ForwardPass(torch.zeros(3, 6, dtype=torch.int64), torch.tensor([6, 1, 4]))):
        assert torch.equal(head(hidden)[:, 0], torch.stack([hidden[0, 5], hidden[1, 0], hidden[2, 3]]))
