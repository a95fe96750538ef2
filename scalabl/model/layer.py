"""The adapted layer. Which layers are adapted, and the pass over a whole model, are `model`'s."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from scalabl_kernels import subspace_projection
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from scalabl.base.placement import device_of
from scalabl.model.packing import Packing


@dataclass
class RowSamples:
    """Which posterior sample each row of the running forward pass uses.

    Attributes:
        s: [S, P], sampled subspace scalars; P is the total over the adapted layers, each owning R columns.
        sample: [M] int64, the row of `s` for each row of the batch.
        fan_out: consecutive rows of the batch that are samples of one input; 1 where their numbers differ.
        inputs: [M] int64, the input of each row; None where each row has an input of its own.
        packing: where the rows' tokens lie in a pass without padding; None for a padded one.
    """

    s: Tensor
    sample: Tensor
    fan_out: int = 1
    inputs: Tensor | None = None
    packing: Packing | None = None


class SampleContext:
    """The one place where the running pass tells the adapted layers their samples. `rows` None: the plain base model."""

    def __init__(self) -> None:
        self.rows: RowSamples | None = None


def is_adaptable(module: nn.Module) -> bool:
    """True for what `SubspaceLinear` can wrap: `nn.Linear` and its quantised relatives, and GPT-2's `Conv1D`."""
    return isinstance(module, nn.Linear | Conv1D) or (
        isinstance(getattr(module, "in_features", None), int) and isinstance(getattr(module, "out_features", None), int)
    )


def _features(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]  # checked by is_adaptable


class SubspaceLinear(nn.Module):
    """A frozen linear layer plus its Bayesian low-rank part: W_k = W0 + scaling * B diag(s_k) A, s_k ~ N(mu, sigma^2).

    The base layer is called, never read: quantised, sharded or transposed weights stay as they are.

    Args:
        base: the layer to adapt, mapping [..., d_in] to [..., d_out].
        rank: R, the number of stochastic scalars.
        scaling: alpha / R.
        columns: where this layer's scalars stand in the model-wide table of samples.
        context: shared by every adapted layer of one model.

    Attributes:
        shared_input: no stochastic layer stands before this one, so that all samples of an input bring the same x.

    Parameters (float32 when made): lora_A [R, d_in], lora_B [d_out, R], s_mean [R], s_log_std [R].
    """

    def __init__(self, base: nn.Module, rank: int, scaling: float, columns: slice, context: SampleContext) -> None:
        super().__init__()
        self.base = base
        self.d_in, self.d_out = _features(base)
        self.rank, self.scaling = rank, scaling
        self._columns, self._context = columns, context
        self.shared_input = False
        device = device_of(base)
        self.lora_A = nn.Parameter(torch.empty(rank, self.d_in, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.d_out, rank, device=device))
        self.s_mean = nn.Parameter(torch.empty(rank, device=device))
        self.s_log_std = nn.Parameter(torch.empty(rank, device=device))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator, std_init: float = 0.05) -> None:
        """The paper's start: A and mu from the SVD of a Kaiming matrix, B zero, sigma ~ U(std_init / sqrt 2, std_init).

        Where R exceeds d_in the surplus rows of A are zero with mu 0, so that the layer stays well defined.
        """
        matrix = torch.empty(self.rank, self.d_in)
        bound = 1.0 / math.sqrt(self.d_in)  # kaiming_uniform_ with a = sqrt 5, as nn.Linear starts
        matrix.uniform_(-bound, bound, generator=generator)
        _, singular, right = torch.linalg.svd(matrix, full_matrices=False)
        kept = singular.shape[0]
        self.lora_A.zero_()[:kept].copy_(right)
        self.s_mean.zero_()[:kept].copy_(singular)
        self.lora_B.zero_()
        spread = torch.rand(self.rank, generator=generator)
        self.s_log_std.copy_(torch.log(std_init * (math.sqrt(0.5) + (1 - math.sqrt(0.5)) * spread)))

    def forward(self, x: Tensor) -> Tensor:
        """[M, ..., d_in] -> [M, ..., d_out], each row with the posterior sample that the context gives it."""
        rows = self._context.rows
        if rows is None:
            plain: Tensor = self.base(x)
            return plain
        if rows.packing is not None:
            return self._packed(x.flatten(0, -2), rows, rows.packing).view(*x.shape[:-1], self.d_out)
        if self.shared_input and rows.fan_out > 1:
            # The same x for every sample of an input: multiply it once, by the base layer and by A.
            x = x[:: rows.fan_out].contiguous()
            y = self.base(x).repeat_interleave(rows.fan_out, dim=0)
        else:
            y = self.base(x)
        return self._project(y, x, rows.s, rows.sample)

    def _packed(self, x: Tensor, rows: RowSamples, packing: Packing) -> Tensor:
        """[N, d_in] -> [N, d_out] for N tokens of all rows, or one of each row where only that is computed."""
        if x.shape[0] != packing.rows.tokens:
            return self._project(self.base(x), x, rows.s, rows.sample)
        y = self.base(x[packing.copy])[packing.source] if self.shared_input and rows.inputs is not None else self.base(x)
        return self._project(y, x, rows.s, rows.sample[packing.row_of_token])

    def _project(self, y: Tensor, x: Tensor, s: Tensor, sample: Tensor) -> Tensor:
        return subspace_projection(
            y,
            x.to(y),  # on another device, where a device map parts the layer from the one before
            self.lora_A.to(y.dtype),
            self.lora_B.to(y.dtype),
            s[:, self._columns].to(y.device),
            sample.to(y.device),
            self.scaling,
            inplace=not torch.is_grad_enabled(),
        )

    @torch.no_grad()
    def delta_weight(self, s: Tensor) -> Tensor:
        """scaling * B diag(s) A for one sample s [R]: [d_out, d_in], as PEFT would merge it."""
        return self.scaling * (self.lora_B * s) @ self.lora_A


class ChoiceHead(nn.Module):
    """A language model's head cut to the rows of the choice tokens, and read at each row's last position only.

    Args:
        inner: [..., D] -> [..., C], the cut head, adapted or not.
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self._device = device_of(inner)
        self.last: Tensor | None = None  # [B or M] int64: the position to read of each row, set before each pass
        self.inputs: Tensor | None = None  # [M] int64: where rows fan out only here
        self.packed = False  # one row holds the tokens of all

    def forward(self, hidden: Tensor) -> Tensor:
        """[M, T, D] -> [M, 1, C]; [B, T, D] -> [M, 1, C] with `inputs`; [1, N, D] in place of either when packed."""
        if self.last is None:
            raise RuntimeError("ChoiceHead.last is not set; run the model through ScalaBLModel.logits")
        last = self.last.to(hidden.device)
        picked = hidden[0, last] if self.packed else hidden[torch.arange(hidden.shape[0], device=hidden.device), last]
        if self.inputs is not None:
            picked = picked[self.inputs.to(picked.device)]
        logits: Tensor = self.inner(picked.to(self._device))
        return logits.unsqueeze(1)


def cut_head(head: nn.Module, choice_tokens: tuple[int, ...]) -> nn.Linear:
    """The rows of a language model's head that belong to the choice tokens, as a linear layer [D] -> [C].

    The rows are copied, so embeddings tied to the head keep their own.

    Raises:
        ValueError: a token is outside the vocabulary, or the head's weight cannot be read row by row (quantised).
    """
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.dim() != 2:
        raise ValueError("the head's weight is quantised; load the base model with its head in floating point")
    vocabulary = weight.shape[0]
    outside = [token for token in choice_tokens if token >= vocabulary]
    if outside:
        raise ValueError(f"choice token {outside[0]} is outside the base model's vocabulary of {vocabulary}")
    bias = getattr(head, "bias", None)
    rows = torch.tensor(choice_tokens, device=weight.device)
    cut = nn.Linear(weight.shape[1], len(choice_tokens), bias=bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        cut.weight.copy_(weight[rows])
        if bias is not None:
            cut.bias.copy_(bias[rows])
    return cut.requires_grad_(False)
