"""Start-up check: whether each input is answered as if it were alone, whatever else is in its pass. If not, it is refused.

The shortcuts of a pass are tested in `probes`, against passes that this check has found to be right.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from scalabl.base.int8 import rounds_activations
from scalabl.config import AdapterConfig
from scalabl.errors import AdapterError, BaseModelError
from scalabl.model.forward_pass import ForwardPass, RowSamples, UnknownRowsError
from scalabl.model.scalabl_model import ScalaBLModel

logger = logging.getLogger("scalabl")

PROBE_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    AttributeError,
)  # that an architecture's code may raise when a pass does not fit it
SHAPES = ((2, 5), (3, 4), (3, 6))  # inputs and tokens of the passes in which layers' inputs are looked at
LENGTHS = (2, 5, 9)  # of the inputs that are compared with themselves alone, padded to `PADDED`
PADDED = 12
LOOSENED = 5.0


def are_alike(base: PreTrainedModel, logits: Sequence[Tensor], expected: Sequence[Tensor], *, loosened: float = 1.0) -> bool:
    """Whether two ways to compute the same logits agree up to rounding.

    Args:
        loosened: how much more than usual they may differ.
    """
    # With 8-bit activations, a difference in the last bit can change which of the 256 values an activation is rounded to.
    exact = base.dtype == torch.float32 and not rounds_activations(base)
    tolerance = (1e-4 if exact else 2e-2) * loosened
    return all(
        one.shape == other.shape and float((one - other).abs().max()) <= tolerance * float(other.abs().max())
        for one, other in zip(logits, expected, strict=True)
    )


@contextmanager
def with_effect(model: ScalaBLModel) -> Iterator[None]:
    """Gives an untrained adapter, whose B is 0, a random B meanwhile, so that rows of other samples have other logits."""
    layers = list(model.adapted.values())
    if any(bool(layer.lora_B.any()) for layer in layers):
        yield
        return
    own = [layer.lora_B.data for layer in layers]
    generator = torch.Generator().manual_seed(0)
    for layer in layers:
        layer.lora_B.data = (0.1 * torch.randn(layer.lora_B.shape, generator=generator)).to(layer.lora_B.data)
    try:
        yield
    finally:
        for layer, data in zip(layers, own, strict=True):
            layer.lora_B.data = data


def check_exactness(model: ScalaBLModel) -> None:
    """Check a base model with an adapter, and turn on attention masks if it needs them (`ScalaBLModel.masks`).

    Raises:
        AdapterError, BaseModelError: as of `check_layers` and `_check_neighbours`.
    """
    check_layers(model)
    _check_neighbours(model)


def check_shapes(skeleton: PreTrainedModel, config: AdapterConfig) -> None:
    """As `check_layers`, without the base model's weights: passes compute the shapes of tensors only.

    Where an architecture's code looks at values (those of a router, say), nothing is found out; serving checks it again.

    Args:
        skeleton: as of `pretrained.load_skeleton`; it stays as it is.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # of which torch knows the shapes of all products, grouped ones too
    try:
        with FakeTensorMode(), no_init_weights():
            base = type(skeleton)(copy.deepcopy(skeleton.config)).eval()
            check_layers(ScalaBLModel(base, config), SHAPES[:1])
    except AdapterError:
        raise
    except Exception as error:
        logger.debug("%s cannot be checked without its weights: %s", type(skeleton).__name__, error)
    finally:
        torch.set_default_dtype(dtype)


@torch.no_grad()
def check_layers(model: ScalaBLModel, shapes: Sequence[tuple[int, int]] = SHAPES) -> None:
    """Check that each adapted layer gets all tokens of each row, or one of each row, so that each gets its row's sample.

    Args:
        shapes: inputs and tokens of each pass.

    Raises:
        AdapterError: a layer gets an unknown part of the tokens, is not a plain linear map, or is not called although its
            weight is used; the message names it.
        BaseModelError: the base model cannot be run on token ids alone.
    """
    architecture, used = type(model.base).__name__, set[str]()

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Any], None]:
        def hook(layer: nn.Module, arguments: tuple[Tensor, ...], output: Any) -> None:
            used.add(name)
            x, adapted = arguments[0], model.adapted[name]
            expected = (*x.shape[:-1], adapted.d_out)
            if x.shape[-1] != adapted.d_in or not isinstance(output, Tensor) or output.shape != expected:
                raise AdapterError(
                    f"{name!r} of the base model {architecture} is a {type(adapted.base).__name__}, which is not a plain "
                    "linear layer; leave it out of the adapter"
                )
            try:
                forward_pass.by_row(x)
            except UnknownRowsError:
                raise AdapterError(
                    f"{name!r} of the base model {architecture} gets {x.shape[:-1].numel()} of "
                    f"{forward_pass.input_ids.numel()} tokens, as a routed expert does, and a pass cannot tell whose they "
                    "are; leave it out of the adapter"
                ) from None

        return hook

    for layer in model.adapted.values():
        layer.weight_was_read = False
    hooks = [layer.register_forward_hook(note(name)) for name, layer in model.adapted.items()]
    try:
        for inputs, tokens in shapes:
            ids = _random_ids(model, inputs, tokens)
            forward_pass = ForwardPass(ids, torch.full((inputs,), tokens, device=ids.device))
            model.run(forward_pass)
    except torch.OutOfMemoryError:
        raise
    except (*PROBE_ERRORS, AssertionError) as error:
        raise _cannot_run(model.base, error) from error
    finally:
        for hook in hooks:
            hook.remove()
    for name, layer in model.adapted.items():
        layer.unused = name not in used
        if layer.unused and layer.weight_was_read:
            raise AdapterError(
                f"{name!r} of the base model {architecture} is not called as a layer, because its code reads the weight "
                "directly, so an adapter has no effect on it; leave it out of the adapter"
            )
    if not used:
        raise AdapterError(f"no adapted module of the base model {architecture} is used when it reads a text")
    if unused := [name for name in model.adapted if name not in used]:
        logger.warning(
            "%d adapted modules have no effect, because the base model does not use them when it reads a text: %s",
            len(unused),
            ", ".join(unused[:3]) + (", …" if len(unused) > 3 else ""),
        )


def _cannot_run(base: PreTrainedModel, error: Exception) -> BaseModelError:
    first = next((line for line in str(error).splitlines() if line.strip()), "no message")
    return BaseModelError(
        f"the base model {type(base).__name__} cannot be run on token ids alone ({type(error).__name__}: {first}); "
        "use a decoder that reads text"
    )


@torch.no_grad()
def _check_neighbours(model: ScalaBLModel) -> None:
    """Check that an input has the same logits in a padded pass, beside longer inputs, as alone and without padding.

    A causal model needs no mask for that. For any other, such as an encoder, passes get one that hides the padding.

    Raises:
        BaseModelError: the logits differ, with a mask too.
    """
    longest = getattr(model.base.config.get_text_config(decoder=True), "max_position_embeddings", None) or PADDED
    width = min(PADDED, longest) if longest > 0 else PADDED  # XLNet says -1 for no limit
    lengths = torch.tensor([min(length, width) for length in LENGTHS], device=model.device)
    ids = _random_ids(model, len(LENGTHS), width)
    padding = torch.arange(width, device=model.device) >= lengths.unsqueeze(1)
    generator = torch.Generator().manual_seed(0)
    member = torch.arange(2, device=model.device) % model.members if model.members > 1 else None
    s = model.sample(torch.randn(2, model.num_stochastic_parameters, generator=generator), member)
    rows = torch.arange(2 * len(LENGTHS), device=model.device)

    def padded(tokens: Tensor) -> Tensor:
        return model.run(ForwardPass(tokens, lengths, RowSamples(s, rows % 2, 2, rows // 2, member=member)))

    def alone() -> Tensor:
        one = torch.zeros(1, dtype=torch.int64, device=model.device)
        samples = [RowSamples(s[k : k + 1], one, member=None if member is None else member[k : k + 1]) for k in range(2)]
        return torch.cat([
            model.run(ForwardPass(ids[i : i + 1, :length], lengths[i : i + 1], samples[k]))
            for i, length in enumerate(lengths.tolist())
            for k in range(2)
        ])  # fmt: skip

    for masks in (False, True):
        model.masks = masks
        try:
            expected, first, second = alone(), padded(ids), padded(ids.masked_fill(padding, 0))
        except torch.OutOfMemoryError:
            raise
        except PROBE_ERRORS:
            continue  # `check_layers` has run the base model; what fails is the mask, or rows of other lengths
        if not bool(torch.isfinite(expected).all()):
            return  # nothing can be compared; such an adapter is refused for its numbers (`check_effect`)
        # Looser than for a shortcut, which is only left out: a base model must not be refused for its rounding. Most of the
        # shortest row is padding, so a base model that sees padding differs by far more.
        in_padding = are_alike(model.base, [second], [first], loosened=LOOSENED)
        if in_padding and are_alike(model.base, [first], [expected], loosened=LOOSENED):
            return
    model.masks = False
    raise BaseModelError(
        f"the base model {type(model.base).__name__} answers an input differently when longer inputs are beside it; "
        "it cannot be served exactly, so use a causal language model"
    )


def _random_ids(model: ScalaBLModel, count: int, tokens: int) -> Tensor:
    """[count, tokens] random token ids."""
    vocabulary = model.base.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (count, tokens), generator=torch.Generator().manual_seed(count))
    return ids.to(model.device)
