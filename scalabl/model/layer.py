"""The adapted linear layer. `scalabl_model` decides which layers are adapted, `forward_pass` describes a pass."""

from __future__ import annotations

import math

import torch
from scalabl_kernels import subspace_projection
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from scalabl.base.placement import device_of
from scalabl.model.forward_pass import RowSamples, running
from scalabl.model.packing import Packing


def is_adaptable(module: nn.Module) -> bool:
    """Whether `SubspaceLinear` can wrap a module: `nn.Linear`, quantised linear layers and GPT-2's `Conv1D`."""
    return isinstance(module, nn.Linear | Conv1D) or (
        isinstance(getattr(module, "in_features", None), int) and isinstance(getattr(module, "out_features", None), int)
    )


def _features(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]  # checked by is_adaptable


class SubspaceLinear(nn.Module):
    """A frozen linear layer plus its Bayesian low-rank part: W_k = W0 + scaling * B diag(s_k) A, s_k ~ N(mu, sigma^2).

    In a mixture each member has A, B, mu and sigma of its own. The base layer is called but its weights are never read, so
    they may be quantised, sharded or transposed.

    Args:
        base: the layer to adapt, mapping [..., d_in] to [..., d_out].
        rank: R, the number of stochastic scalars.
        scaling: alpha / R.
        columns: this layer's columns in the model-wide table of sampled scalars.
        members: M, the number of members of the mixture.

    Attributes:
        shared_input: whether x is the same for all samples of an input, because no stochastic layer comes before this one.

    Parameters (float32 at first): lora_A [R, d_in], lora_B [d_out, R], s_mean [R], s_log_std [R], each with a leading [M] if
    there are several members.
    """

    def __init__(self, base: nn.Module, rank: int, scaling: float, columns: slice, members: int = 1) -> None:
        super().__init__()
        self.base = base
        self.d_in, self.d_out = _features(base)
        self.rank, self.scaling, self.members = rank, scaling, members
        self._columns = columns
        self.shared_input = False
        device = device_of(base)
        stack = () if members == 1 else (members,)
        self.lora_A = nn.Parameter(torch.empty(*stack, rank, self.d_in, device=device))
        self.lora_B = nn.Parameter(torch.zeros(*stack, self.d_out, rank, device=device))
        self.s_mean = nn.Parameter(torch.empty(*stack, rank, device=device))
        self.s_log_std = nn.Parameter(torch.empty(*stack, rank, device=device))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator, std_init: float = 0.05) -> None:
        """As in the paper: A and mu from the SVD of a Kaiming matrix, B = 0, sigma ~ U(std_init / sqrt 2, std_init).

        If R exceeds d_in, the surplus rows of A and entries of mu are 0. Members are different random draws.
        """
        for member in range(self.members):
            self._reset_member(member, generator, std_init)

    def _reset_member(self, member: int, generator: torch.Generator, std_init: float) -> None:
        lora_a, lora_b, s_mean, s_log_std = (
            parameter if self.members == 1 else parameter[member]
            for parameter in (self.lora_A, self.lora_B, self.s_mean, self.s_log_std)
        )
        matrix = torch.empty(self.rank, self.d_in)
        bound = 1.0 / math.sqrt(self.d_in)  # as in nn.Linear: kaiming_uniform_ with a = sqrt 5
        matrix.uniform_(-bound, bound, generator=generator)
        _, singular, right = torch.linalg.svd(matrix, full_matrices=False)
        full_rank = singular.shape[0]
        lora_a.zero_()[:full_rank].copy_(right)
        s_mean.zero_()[:full_rank].copy_(singular)
        lora_b.zero_()
        spread = torch.rand(self.rank, generator=generator)
        s_log_std.copy_(torch.log(std_init * (math.sqrt(0.5) + (1 - math.sqrt(0.5)) * spread)))

    def forward(self, x: Tensor) -> Tensor:
        """[M, ..., d_in] -> [M, ..., d_out], each row with its posterior sample in the running pass.

        Outside of a pass, and in a pass without samples, only the base layer is applied.
        """
        forward_pass = running()
        if forward_pass is None or forward_pass.samples is None:
            plain: Tensor = self.base(x)
            return plain
        samples = forward_pass.samples
        if forward_pass.packing is not None:
            return self._packed(x.flatten(0, -2), samples, forward_pass.packing).view(*x.shape[:-1], self.d_out)
        if self.shared_input and samples.fan_out > 1:
            # The same x for every sample of an input: multiply it once, by the base layer and by A.
            x = x[:: samples.fan_out].contiguous()
            y = self.base(x).repeat_interleave(samples.fan_out, dim=0)
        else:
            y = self.base(x)
        return self._project(y, x, samples, samples.sample)

    def of_rows(self, x: Tensor, samples: RowSamples) -> Tensor:
        """[M, d_in] -> [M, d_out] for rows with these samples, whatever the running pass has."""
        return self._project(self.base(x), x, samples, samples.sample)

    def _packed(self, x: Tensor, samples: RowSamples, packing: Packing) -> Tensor:
        """[N, d_in] -> [N, d_out] for the N tokens of all rows, or for each row's last token if only that is computed."""
        if x.shape[0] != packing.rows.tokens:
            return self.of_rows(x, samples)
        once = self.shared_input and samples.inputs is not None
        y = self.base(x[packing.copy])[packing.source] if once else self.base(x)
        return self._project(y, x, samples, samples.sample[packing.row_of_token])

    def _project(self, y: Tensor, x: Tensor, samples: RowSamples, sample: Tensor) -> Tensor:
        lora_a, lora_b = samples.matrices.get(self._columns.start, (self.lora_A, self.lora_B))
        return subspace_projection(
            y,
            x.to(y),  # x may be on another device, if a device map divides the model here
            lora_a.to(y.dtype),
            lora_b.to(y.dtype),
            samples.s[:, self._columns].to(y.device),
            sample.to(y.device),
            self.scaling,
            None if samples.member is None else samples.member.to(y.device),
            inplace=not torch.is_grad_enabled(),
        )

    @torch.no_grad()
    def delta_weight(self, s: Tensor, member: int = 0) -> Tensor:
        """scaling * B diag(s) A for one sample s [R] of a member: [d_out, d_in], as PEFT would merge it."""
        lora_a, lora_b = (self.lora_A, self.lora_B) if self.members == 1 else (self.lora_A[member], self.lora_B[member])
        return self.scaling * (lora_b * s) @ lora_a
