"""int8 quantisation on a CPU: linear layers with 8-bit weights and activations that replace a base model's own.

Each row of the input has its own scale, so that a row's result does not depend on the other rows of the batch. torch's
dynamic quantisation has one scale for the whole tensor, and one outlier token (the first token of most models) makes it too
coarse for all others. Input channels that are large in every token are scaled down, and their weights up (SmoothQuant: Xiao
et al., ICML 2023, arXiv 2211.10438, eq. 4 with alpha = 1/2). The size of the channels is measured on random tokens with a
fixed seed, so that no data are needed and all replicas get the same result.

The products are computed by oneDNN (`torch.ops.onednn`), because torch's own quantised tensors are deprecated. The
bitsandbytes formats for GPUs are in `pretrained`.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from scalabl.errors import BaseModelError

ZERO = 128  # the unsigned 8-bit number that represents 0
LOWEST_REACH = 0.01  # a channel's reach counts as at least this share of the mean reach
BLOCK_ROWS = 256  # rows that are multiplied at a time, for each thread
PROBE_ROWS, PROBE_LENGTH = 8, 32  # random tokens on which the channels are measured


class Int8Linear(nn.Module):
    """[..., d_in] -> [..., d_out] in float32 or a smaller type, with the weights of a linear layer in 8 bits.

    The gradient by x ignores the rounding of activations (straight-through), and uses the 8-bit weights.

    Args:
        linear: nn.Linear, or GPT-2's Conv1D, whose weights are transposed; on a CPU.
        reach: [d_in], the largest |x| of each input channel that was measured; zeros if the layer was not run.

    Attributes:
        rounds: a switch for all layers of this class: whether activations are rounded; see `unrounded`.
    """

    rounds: ClassVar[bool] = True
    narrowing: Tensor  # [d_in], the factor of each input channel
    scale: Tensor  # [d_out], the scale of the 8-bit weights
    zero_points: Tensor

    def __init__(self, linear: nn.Linear | Conv1D, reach: Tensor) -> None:
        super().__init__()
        weight = _weight(linear).float()  # [d_out, d_in]
        self.out_features, self.in_features = weight.shape
        self.bias: nn.Parameter | None = linear.bias
        # A channel that was nearly 0 on random tokens may be larger on others, hence the lower bound.
        smooth = (reach.clamp_min(LOWEST_REACH * float(reach.mean())) / weight.abs().amax(0)).sqrt()
        smooth[~(smooth.isfinite() & (smooth > 0))] = 1  # the layer was not run, or the weights are 0
        self.register_buffer("narrowing", 1 / smooth)
        scale = (weight * smooth).abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / weight_levels()
        self.register_buffer("scale", scale)
        self.register_buffer("zero_points", torch.zeros(self.out_features, dtype=torch.int64))
        rounded = (weight * smooth / scale.unsqueeze(1)).round_().to(torch.int8)
        # Not a buffer: oneDNN's packed format can be neither moved nor copied. It ignores strides, hence contiguous().
        self._packed = torch.ops.onednn.qlinear_prepack(rounded.contiguous(), None)

    def forward(self, x: Tensor) -> Tensor:
        if not Int8Linear.rounds:
            return nn.functional.linear(x, self.weight_as_multiplied().to(x.dtype), self.bias)
        if torch.is_grad_enabled() and x.requires_grad:
            return _StraightProduct.apply(x, self)  # type: ignore[no-any-return, no-untyped-call]  # torch's apply
        return self.multiply(x)

    @torch.no_grad()
    def multiply(self, x: Tensor) -> Tensor:
        """The product plus the bias, without gradients. Blocks of rows that fit the CPU's cache halve the time."""
        rows = x.reshape(-1, self.in_features)
        y = torch.empty(len(rows), self.out_features, dtype=x.dtype)
        block = BLOCK_ROWS * torch.get_num_threads()
        for block_rows, result in zip(torch.split(rows, block), torch.split(y, block), strict=True):
            narrow = block_rows * self.narrowing
            scale = narrow.abs().amax(-1, keepdim=True).clamp_min_(torch.finfo(torch.float32).tiny * 127).div_(127)
            signed = narrow.div_(scale).round_().to(torch.int8)
            product = self._product(signed.view(torch.uint8).bitwise_xor_(ZERO))  # from -128 .. 127 to 0 .. 255
            if self.bias is None:
                torch.mul(product, scale, out=result)
            else:
                torch.addcmul(self.bias, product, scale, out=result)
        return y.view(*x.shape[:-1], self.out_features)

    def weight_as_multiplied(self) -> Tensor:
        """[d_out, d_in] float32, the de-quantised weights. The packed ones cannot be read, so they multiply the identity."""
        unit = torch.full((self.in_features, self.in_features), ZERO, dtype=torch.uint8)
        unit.diagonal().add_(1)
        return (self._product(unit) * self.narrowing.unsqueeze(1)).T

    def _product(self, unsigned: Tensor) -> Tensor:
        y: Tensor = torch.ops.onednn.qlinear_pointwise(
            unsigned, 1.0, ZERO, self._packed, self.scale, self.zero_points, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return y


@contextmanager
def unrounded() -> Iterator[None]:
    """Turns off the rounding of activations in all `Int8Linear`s, so that two computations agree up to float rounding."""
    Int8Linear.rounds = False
    try:
        yield
    finally:
        Int8Linear.rounds = True


class _StraightProduct(torch.autograd.Function):
    """The product of an `Int8Linear` with a straight-through gradient: the rounding of activations is ignored."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Int8Linear) -> Tensor:
        ctx.layer = layer
        return layer.multiply(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.weight_as_multiplied().to(gradient.dtype), None


@functools.cache
def weight_levels() -> int:
    """The largest 8-bit weight to use: 127, or 64 on processors without VNNI instructions; measured by a product.

    Without VNNI (AVX2, the first AVX-512) two products of 8-bit numbers are added in 16 bits, which overflows silently above
    32,767. 2 x 255 x 64 does not overflow.
    """
    largest, width = 127, 256
    packed = torch.ops.onednn.qlinear_prepack(torch.full((64, width), largest, dtype=torch.int8), None)
    one, zero = torch.ones(64), torch.zeros(64, dtype=torch.int64)
    x = torch.full((64, width), 255, dtype=torch.uint8)
    y = torch.ops.onednn.qlinear_pointwise(x, 1.0, 0, packed, one, zero, None, 1.0, 0, torch.float32, "none", [], "")
    return largest if bool((y == 255 * largest * width).all()) else 64


@torch.no_grad()
def to_int8(model: PreTrainedModel) -> int:
    """Replace every linear layer of a model, except its head, by an `Int8Linear`; returns the number of layers.

    To be called before any adapter is created for the model. Weights outside of linear layers (embeddings, convolutions,
    experts that share one tensor) stay as they are.

    Raises:
        BaseModelError: the processor or torch does not support it, or the model's code reads its layers' weights directly.
    """
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # torch
    if platform.machine().lower() not in ("x86_64", "amd64") or not has_onednn:
        raise BaseModelError("quantization int8 needs an x86 processor and a torch with oneDNN; leave --quantization out")
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        raise BaseModelError("quantization int8 works only for a base model on a CPU; on a GPU use bnb-8bit or bnb-4bit")
    places: dict[nn.Linear | Conv1D, list[tuple[nn.Module, str]]] = {}
    for parent, name, module in _linears(model):
        if module is not model.get_output_embeddings():
            places.setdefault(module, []).append((parent, name))
    reach = _reach(model, list(places))
    count = len(places)
    while places:  # one at a time, so that the original weights are freed one by one
        module, parents = places.popitem()
        replacement = Int8Linear(module, reach.pop(module))
        for parent, name in parents:
            parent._modules[name] = replacement
    try:
        _run_probe(model)
    except AttributeError as error:
        raise BaseModelError(
            f"quantization int8 does not support {type(model).__name__}, whose code reads its layers' weights ({error}); "
            "leave --quantization out"
        ) from None
    return count


def rounds_activations(model: PreTrainedModel) -> bool:
    """Whether a model has layers that round activations to 8 bits: `Int8Linear`, or bitsandbytes' in 8 bits."""
    ours = Int8Linear.rounds and any(isinstance(module, Int8Linear) for module in model.modules())
    return ours or bool(getattr(model, "is_loaded_in_8bit", False))


def _weight(linear: nn.Linear | Conv1D) -> Tensor:
    weight: Tensor = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
    return weight.detach()


def _linears(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Linear | Conv1D]]:
    for parent in model.modules():
        for name, module in parent.named_children():
            if type(module) in (nn.Linear, Conv1D):  # not subclasses, whose forward may differ
                yield parent, name, module


def _reach(model: PreTrainedModel, linears: list[nn.Linear | Conv1D]) -> dict[nn.Module, Tensor]:
    """The largest |x| of each input channel of each layer, measured on random tokens."""
    reach: dict[nn.Module, Tensor] = {module: torch.zeros(_weight(module).shape[1]) for module in linears}

    def note(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0].detach().float().reshape(-1, arguments[0].shape[-1])
        if len(x):
            torch.maximum(reach[module], x.abs().amax(0), out=reach[module])

    handles = [module.register_forward_pre_hook(note) for module in linears]
    try:
        _run_probe(model)
    finally:
        for handle in handles:
            handle.remove()
    return reach


def _run_probe(model: PreTrainedModel) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or PROBE_LENGTH
    vocabulary = model.get_input_embeddings().num_embeddings
    shape = (PROBE_ROWS, min(PROBE_LENGTH, limit))
    ids = torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(0))
    model.base_model(input_ids=ids, use_cache=False)  # without the head
