"""Derivatives of a model's logits by the subspace scalars. What they are used for is in `uncertainty` and `training`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scalabl.model.forward_pass import ForwardPass, HeadStates, RowSamples
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.model.token_batch import TokenBatch

GRADIENT_TOKENS = 2048  # rows x padded length in one graph


def jacobian(
    model: ScalaBLModel,
    batch: TokenBatch,
    active: Tensor,
    *,
    states: Tensor | None = None,
    max_tokens: int = GRADIENT_TOKENS,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of B inputs at each member's mean, their derivatives by the subspace scalars, and the hidden states there.

    Args:
        active: [B, C] bool, the choices whose derivatives to compute, at least one for each input.
        states, max_tokens: as of `derivatives`.

    Returns:
        ([B, M, C], [B, M, C, P], [B, D]): derivatives are zero where not active, states averaged over the members.
    """
    shape = (len(active), model.members, model.num_choices)
    inputs, members, choices = active.to(model.device).unsqueeze(1).expand(shape).nonzero(as_tuple=True)  # [rows]
    one_choice = nn.functional.one_hot(choices, model.num_choices)
    logits, gradients, read = derivatives(model, batch, inputs, members, one_choice, states=states, max_tokens=max_tokens)
    slopes = gradients.new_zeros(*shape, gradients.shape[1])
    slopes[inputs, members, choices] = gradients
    starts = torch.arange(shape[0] * shape[1], device=model.device)
    firsts = torch.searchsorted(inputs * model.members + members, starts)
    return logits[firsts].view(shape), slopes, read[firsts].view(*shape[:2], -1).mean(1)


@torch.enable_grad()
def derivatives(
    model: ScalaBLModel,
    batch: TokenBatch,
    inputs: Tensor,
    members: Tensor,
    weights: Tensor,
    *,
    states: Tensor | None = None,
    max_tokens: int = GRADIENT_TOKENS,
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives of weighted sums of logits by the subspace scalars, each at a member's mean.

    Each of the N sums is a row with scalars of its own, so one reverse pass of the rows' total gives all derivatives.
    Rows are split into several graphs to limit memory.

    Args:
        inputs: [N], the input of each row, in ascending order.
        members: [N], the member of each row.
        weights: [N, C], the weight of each logit in the row's sum.
        states: as of `ForwardPass`, of a batch that is right-padded.
        max_tokens: rows x padded length in one graph; a single row may exceed it.

    Returns:
        ([N, C], the logits of each row; [N, P], the derivatives; [N, D] float32, the hidden states that the head reads).
    """
    ids, lengths = (tensor.to(model.device) for tensor in batch.right_padded())
    inputs, members, weights = (tensor.to(model.device) for tensor in (inputs, members, weights))
    mean = model.posterior().mean.detach()
    logits: list[Tensor] = []
    gradients: list[Tensor] = []
    read: list[Tensor] = []
    for rows in torch.split(torch.arange(len(inputs)), max(1, max_tokens // ids.shape[1])):
        s = mean[members[rows]].requires_grad_()
        part = slice(int(inputs[rows[0]]), int(inputs[rows[-1]]) + 1)
        member = members[rows] if model.members > 1 else None
        samples = RowSamples(s, rows.to(model.device) - rows[0], inputs=inputs[rows] - part.start, member=member)
        of_part, head_states = None if states is None else states[part], HeadStates()
        wanted = ForwardPass(ids[part], lengths[part], samples, states=of_part, head_states=head_states)
        z = model.run(wanted)  # [rows, C]
        gradients += torch.autograd.grad((weights[rows] * z).sum(), s)
        logits.append(z.detach())
        assert head_states.rows is not None  # every pass ends with the head
        read.append(head_states.rows.detach().float().to(model.device))
    return torch.cat(logits), torch.cat(gradients), torch.cat(read)
