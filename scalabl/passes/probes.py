"""Start-up probes: each shortcut of a pass is compared with the plain computation, and left off where results differ.

A shortcut is known by what it computes and not by the name of an architecture, so that this holds for any base model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from scalabl.base.int8 import rounds_activations, unrounded
from scalabl.model.forward_pass import ForwardPass, RowSamples
from scalabl.model.packed_attention import may_pack
from scalabl.model.packing import Packing
from scalabl.model.scalabl_model import ScalaBLModel

PROBE_ERRORS = (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError)  # of an architecture's own code


def are_alike(base: PreTrainedModel, logits: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether two ways to compute the same logits agree up to rounding."""
    # A difference in the last bit can take an activation over the edge between two of its 256 values.
    exact = base.dtype == torch.float32 and not rounds_activations(base)
    tolerance = 1e-4 if exact else 2e-2
    return all(
        one.shape == other.shape and float((one - other).abs().max()) <= tolerance * float(other.abs().max())
        for one, other in zip(logits, expected, strict=True)
    )


@unrounded()
@torch.no_grad()
def find_shared_work(model: ScalaBLModel) -> None:
    """Try each shortcut with this base model and adapter, and turn on those that change no logit.

    * The trunk (`model.trunk`): rows fan out to samples after the blocks that no sample changes; and the last block's MLP
      computes only the position that is read.
    * Passes without padding (`model.packing`). On a CPU only, where attention over one length after the other costs less
      than padding does.
    * Adapted layers before which nothing is random multiply each input once: the first of a pass, and every other layer
      that is given the very same tensor (q, k and v of one attention).
    """
    trunk = model.trunk
    if trunk.blocks:
        trunk.learn(lambda count: model.run(ForwardPass(*_inputs(model, count))))
    expected = _probe(model, fans_out=False, trims=False)
    trunk.verified = trunk.possible and _agrees(model, expected, fans_out=True, trims=False)
    trunk.trims = bool(trunk.blocks) and _agrees(model, expected, fans_out=trunk.verified, trims=True)
    model.packs = trunk.verified and may_pack(model.base) and _packs_alike(model, expected)
    calls: list[tuple[str, Tensor, int]] = []  # holding the tensors keeps their memory from being used again

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
    """Whether passes without padding are possible and get the numbers of those with it."""

    def run(count: int) -> int:
        ids, lengths = _inputs(model, count)
        packing = Packing.of(lengths, [1] * count)
        s = model.sample(torch.zeros(1, model.num_stochastic_parameters))
        model.run(ForwardPass(ids, lengths, RowSamples(s, torch.zeros_like(lengths)), packing))
        return packing.rows.tokens

    try:
        if model.trunk.blocks:
            model.trunk.learn_packed(run)
    except PROBE_ERRORS:
        return False
    return _agrees(model, expected, fans_out=True, trims=model.trunk.trims, packs=True)


def _probe(model: ScalaBLModel, *, fans_out: bool, trims: bool, packs: bool = False) -> list[Tensor]:
    """Logits of a few inputs under two samples, with and without the trunk, the trimming and padding."""
    generator = torch.Generator().manual_seed(0)
    trunk = model.trunk
    before = trunk.verified, trunk.trims
    logits = []
    try:
        trunk.verified, trunk.trims = fans_out, trims
        for count in (1, 2, 3):
            ids, lengths = _inputs(model, count)
            s = model.sample(torch.randn(2, model.num_stochastic_parameters, generator=generator))
            rows = torch.arange(2 * count, device=model.device)
            packing = Packing.of(lengths, [2] * count) if packs else None
            logits.append(model.run(ForwardPass(ids, lengths, RowSamples(s, rows % 2, 2, rows // 2), packing)))
    finally:
        trunk.verified, trunk.trims = before
    return logits


def _inputs(model: ScalaBLModel, count: int) -> tuple[Tensor, Tensor]:
    """(ids [B, 5], lengths [B], ascending): random, for a check of shapes and numbers."""
    vocabulary = model.base.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (count, 5), generator=torch.Generator().manual_seed(count))
    return ids.to(model.device), torch.arange(6 - count, 6, device=model.device)


def _agrees(model: ScalaBLModel, expected: list[Tensor], *, fans_out: bool, trims: bool, packs: bool = False) -> bool:
    try:
        logits = _probe(model, fans_out=fans_out, trims=trims, packs=packs)
    except PROBE_ERRORS:
        return False  # a block takes its rows in another form: every row runs from start to end, as without a trunk
    return are_alike(model.base, logits, expected)
