"""Runs a model over a data set, in batches of similar length: logits and predictives of every input.

Results are scored in `scoring`. How logits become a predictive is in `uncertainty`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scalabl.evaluation.encoded import EncodedSet
from scalabl.model.posterior import Draws
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.model.token_batch import TokenBatch
from scalabl.passes.batches import batches
from scalabl.passes.trunk_cache import trunk_cache
from scalabl.uncertainty.absent_choices import without_absent
from scalabl.uncertainty.adaptive import Estimate, Rule, sample_adaptively
from scalabl.uncertainty.linearized import controlled, linearize
from scalabl.uncertainty.predictive import Predictive, predictive

BLOCK_VALUES = 2**23  # logits of the inputs whose predictive is computed at once


def logits_of(
    model: ScalaBLModel,
    sequences: Sequence[Sequence[int]],
    draws: Draws,
    *,
    max_batch_tokens: int = 4096,
    on_progress: Callable[[int], object] | None = None,
    states: Callable[[Tensor, int], Tensor] | None = None,
) -> Tensor:
    """Logits [N, K, C] of N prompts.

    Args:
        max_batch_tokens: the most tokens in a batch, counting every sample and padding.
        on_progress: called after each batch with its number of inputs.
        states: looks up cached trunk states: (indices [B], width T) -> [B, T, D] (`trunk_cache.TrunkCache.of`).
    """
    result = torch.empty(len(sequences), draws.num_samples, model.num_choices)
    for batch in batches([len(ids) for ids in sequences], draws.num_samples, max_batch_tokens):
        tokens = TokenBatch.of([sequences[i] for i in batch])
        trunk_states = states(torch.tensor(batch), tokens.input_ids.shape[1]) if states is not None else None
        result[batch] = model.logits(tokens, draws, trunk_states).cpu()
        if on_progress is not None:
            on_progress(len(batch))
    return result


def predictive_of(logits: Tensor, num_choices: Tensor, model: ScalaBLModel, draws: Draws) -> Predictive:
    """The predictive of N inputs from their logits [N, K, C], each over its own choices.

    It is computed in blocks of inputs, because its intermediate results take several times the memory of the logits.
    """
    size = max(1, BLOCK_VALUES // logits[0].numel())
    return Predictive.concatenated(
        [
            predictive(without_absent(block, counts), model.config.temperature, draws.scheme, draws.members)
            for block, counts in zip(torch.split(logits, size), torch.split(num_choices, size), strict=True)
        ]
    )


def linearized_predictive(
    model: ScalaBLModel,
    encoded: EncodedSet,
    *,
    draws: Draws | None = None,
    negligible: float = 0.0,
    max_batch_tokens: int = 4096,
    on_progress: Callable[[int], object] | None = None,
) -> Predictive:
    """The linearised predictive of a data set, each input over its own choices.

    Args:
        draws: if given, sample with these draws and use the linearisation only as a control variate (`controlled`).
        negligible: as of `linearize`.
    """
    outcomes: dict[int, Predictive] = {}
    rows = model.members * model.num_choices
    rows = rows if draws is None else max(rows, draws.num_samples)
    for batch in batches([len(ids) for ids in encoded.sequences], rows, max_batch_tokens):
        tokens, counts = TokenBatch.of([encoded.sequences[i] for i in batch]), encoded.num_choices[batch]
        linear = linearize(model, tokens, choices=counts.tolist(), negligible=negligible)
        if draws is None:
            outcome = linear.predictive(model.config.temperature)
        else:
            logits = without_absent(model.logits(tokens, draws).cpu(), counts)
            outcome = controlled(logits, linear, draws, model.config.temperature)
        outcomes |= {index: outcome.of_input(row) for row, index in enumerate(batch)}
        if on_progress is not None:
            on_progress(len(batch))
    return Predictive.stack([outcomes[index] for index in range(len(outcomes))])


def adaptive_predictive(
    model: ScalaBLModel,
    encoded: EncodedSet,
    draws: Draws,
    rule: Rule,
    *,
    max_batch_tokens: int = 4096,
    trunk_gib: float = 1.0,
) -> list[Estimate]:
    """The predictive of a data set by adaptive sampling, each input over its own choices.

    Args:
        draws: must have `rule.most` samples.
        trunk_gib: GiB for the trunk's states of all inputs. If they fit, the trunk runs once instead of in every round.
    """
    assert draws.num_samples == rule.most
    cache = trunk_cache(model, encoded.sequences, trunk_gib)

    def run(unsettled: Sequence[int], start: int, stop: int) -> Tensor:
        def states(batch: Tensor, width: int) -> Tensor:
            assert cache is not None
            return cache.of(torch.tensor(unsettled)[batch], width)

        logits = logits_of(
            model,
            [encoded.sequences[index] for index in unsettled],
            draws.part(start, stop),
            max_batch_tokens=max_batch_tokens,
            states=None if cache is None else states,
        )
        return without_absent(logits, encoded.num_choices[list(unsettled)])

    return sample_adaptively(
        run,
        len(encoded.sequences),
        rule,
        temperature=model.config.temperature,
        scheme=draws.scheme,
        members=draws.members,
    )
