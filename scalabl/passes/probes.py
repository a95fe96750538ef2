"""Start-up probes: each shortcut of a pass is compared with the plain computation, and disabled if the results differ.

Shortcuts are tested by what they compute, not by the architecture's name, so this works for any base model. The prefix cache
is tested in `prefix`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from scalabl.base.int8 import rounds_activations, unrounded
from scalabl.model.forward_pass import ForwardPass
from scalabl.model.packed_attention import may_pack
from scalabl.model.packing import Packing
from scalabl.model.posterior import Draws
from scalabl.model.scalabl_model import ScalaBLModel

PROBE_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    AttributeError,
)  # that an architecture's code may raise when a shortcut does not fit it


def are_alike(base: PreTrainedModel, logits: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether two ways to compute the same logits agree up to rounding."""
    # With 8-bit activations, a difference in the last bit can change which of the 256 values an activation is rounded to.
    exact = base.dtype == torch.float32 and not rounds_activations(base)
    tolerance = 1e-4 if exact else 2e-2
    return all(
        one.shape == other.shape and float((one - other).abs().max()) <= tolerance * float(other.abs().max())
        for one, other in zip(logits, expected, strict=True)
    )


@unrounded()
@torch.no_grad()
def find_shared_work(model: ScalaBLModel) -> None:
    """Test each shortcut with this base model and adapter, and turn on those that change no logit beyond rounding.

    * The trunk (`model.trunk`): rows fan out to samples only after the blocks that are the same for all samples; and the
      last block's MLP computes only the position whose logits are read.
    * Packed passes, without padding (`model.packing`). On a CPU only, where separate attention calls for each length cost
      less than padding.
    * Adapted layers whose input is the same for all samples multiply it once for each input: the first layer of a pass, and
      layers that get the same tensor (q, k and v of one attention).
    """
    trunk = model.trunk
    if trunk.blocks:
        trunk.learn(lambda count: model.run(ForwardPass(*_inputs(model, count))))
    expected = _probe(model, fans_out=False, trims=False)
    trunk.verified = trunk.possible and _agrees(model, expected, fans_out=True, trims=False)
    trunk.trims = bool(trunk.blocks) and _agrees(model, expected, fans_out=trunk.verified, trims=True)
    model.packs = trunk.verified and may_pack(model.base) and _packs_alike(model, expected)
    calls: list[tuple[str, Tensor, int]] = []  # keeping the tensors alive prevents the reuse of their memory

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, arguments: calls.append((name, arguments[0], arguments[0]._version))

    hooks = [layer.register_forward_pre_hook(note(name)) for name, layer in model.adapted.items()]
    try:
        length = torch.ones(1, dtype=torch.int64, device=model.device)
        model.run(ForwardPass(torch.zeros(1, 1, dtype=torch.int64, device=model.device), length))
    finally:
        for hook in hooks:
            hook.remove()
    _, first, version = calls[0]
    for name, layer in model.adapted.items():
        layer.shared_input = all(x is first and seen == version for called, x, seen in calls if called == name)


def _packs_alike(model: ScalaBLModel, expected: list[Tensor]) -> bool:
    """Whether packed passes work and give the same logits as padded ones."""

    def run(count: int) -> int:
        ids, lengths = _inputs(model, count)
        packing = Packing.of(lengths, [1] * count)
        samples, _ = model.row_samples([model.mean_draw().part(0, 1)] * count)
        model.run(ForwardPass(ids, lengths, samples, packing))
        return packing.rows.tokens

    try:
        if model.trunk.blocks:
            model.trunk.learn_packed(run)
    except PROBE_ERRORS:
        return False
    return _agrees(model, expected, fans_out=True, trims=model.trunk.trims, packs=True)


def _probe(model: ScalaBLModel, *, fans_out: bool, trims: bool, packs: bool = False) -> list[Tensor]:
    """Logits of a few inputs under two samples or one of each member, with the given shortcuts turned on or off."""
    generator = torch.Generator().manual_seed(0)
    trunk = model.trunk
    before = trunk.verified, trunk.trims
    logits = []
    try:
        trunk.verified, trunk.trims = fans_out, trims
        for count in (1, 2, 3):
            ids, lengths = _inputs(model, count)
            epsilon = torch.randn(max(2, model.members), model.num_stochastic_parameters, generator=generator)
            samples, counts = model.row_samples([Draws(0, "gaussian", epsilon, members=model.members)] * count)
            packing = Packing.of(lengths, counts) if packs else None
            logits.append(model.run(ForwardPass(ids, lengths, samples, packing)))
    finally:
        trunk.verified, trunk.trims = before
    return logits


def _inputs(model: ScalaBLModel, count: int) -> tuple[Tensor, Tensor]:
    """(ids [B, 5], lengths [B], ascending): random inputs for a probe."""
    vocabulary = model.base.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (count, 5), generator=torch.Generator().manual_seed(count))
    return ids.to(model.device), torch.arange(6 - count, 6, device=model.device)


def _agrees(model: ScalaBLModel, expected: list[Tensor], *, fans_out: bool, trims: bool, packs: bool = False) -> bool:
    """Whether the given shortcuts work and change no logit."""
    try:
        logits = _probe(model, fans_out=fans_out, trims=trims, packs=packs)
    except PROBE_ERRORS:
        return False  # the architecture does not support the shortcut, which then stays off
    return are_alike(model.base, logits, expected)
