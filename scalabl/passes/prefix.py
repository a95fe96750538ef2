"""Start-up probe of the prefix cache: whether a pass that begins after a cached prefix gives the same logits.

Which prefixes are cached is decided in `prefix_cache`. Other shortcuts are tested in `probes`.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from scalabl.base.int8 import unrounded
from scalabl.model.past import Past
from scalabl.model.posterior import Draws
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.model.token_batch import TokenBatch
from scalabl.passes.probes import PROBE_ERRORS, are_alike

SHORT = 12  # tokens of a probe
LONGEST_WINDOW = 64  # the longest attention window for which a probe has more tokens than the window
UNLIMITED = 2**62


@torch.inference_mode()
def longest_exact(model: ScalaBLModel) -> int:
    """The most tokens of a prompt for which a cached prefix is known to change no logit; 0 if it changes any.

    It is tested with a few short passes, so that it works for any architecture. If attention has a window longer than these
    passes, or positions are scaled above some prompt length, the result is limited to that length.
    """
    window = _window(model.base)
    length = window + SHORT if window <= LONGEST_WINDOW else SHORT
    longest = window if length <= window < UNLIMITED else UNLIMITED
    return min(longest, _unscaled(model.base)) if _is_exact(model, length) else 0


@unrounded()
def _is_exact(model: ScalaBLModel, length: int) -> bool:
    """Whether passes that begin after half of `length` tokens give the same logits as passes over all of them."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.base.get_input_embeddings().num_embeddings
    tokens = torch.randint(vocabulary, (3, length), generator=generator)
    half = length // 2
    tokens[:, :half] = tokens[0, :half]
    two, one = (
        Draws(0, "gaussian", torch.randn(n, model.num_stochastic_parameters, generator=generator), members=model.members)
        for n in (2, 1)
    )
    probes = (
        ([length], [two]),
        ([length - 1, half + 1], [two, two]),
        ([half + 1, length, half + 2], [two, one, two]),
    )
    expected, rests = [], []
    for lengths, draws in probes:
        sequences = [tokens[row, :end].tolist() for row, end in enumerate(lengths)]
        expected.append(torch.cat(model.logits_each(TokenBatch.of(sequences), draws)))
        rests.append(TokenBatch.of([ids[half:] for ids in sequences]))
    first = tokens[0, :half].tolist()
    try:
        prefixes = {}
        for draws_of_row in (two, one):  # computed in two passes, the second of which continues the first
            start = Past({draws_of_row.key: [model.prefix(first[:-1], draws_of_row)]}, half // 2)
            prefixes[draws_of_row.key] = [model.prefix(first[half // 2 :], draws_of_row, start)]
        logits = [
            torch.cat(model.logits_each(rest, draws, past=Past(prefixes, half)))
            for rest, (_, draws) in zip(rests, probes, strict=True)
        ]
    except PROBE_ERRORS:
        return False  # the architecture keeps other state than keys and values
    return are_alike(model.base, logits, expected)


def _window(base: PreTrainedModel) -> int:
    """The smallest attention window of the base model, in tokens."""
    config = base.config.get_text_config(decoder=True)
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((int(window) for window in windows if window), default=UNLIMITED)


def _unscaled(base: PreTrainedModel) -> int:
    """The most tokens of a prompt up to which no rotary embedding scales positions by the prompt's length."""
    config = base.config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or {}
    ropes = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    scaled = [rope for rope in ropes if rope.get("rope_type") in ("dynamic", "longrope")]
    return min(
        (int(rope.get("original_max_position_embeddings") or config.max_position_embeddings) for rope in scaled),
        default=UNLIMITED,
    )
