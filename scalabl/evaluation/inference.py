"""Running a model over labelled sets and scoring what comes out: accuracy, calibration, and telling OOD inputs apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from scalabl.errors import DatasetError, PromptError
from scalabl.evaluation.dataset import Example
from scalabl.evaluation.scoring import labelled_scores, outside_scores
from scalabl.model.posterior import Draws
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.model.token_batch import TokenBatch
from scalabl.prompt import Prompter
from scalabl.uncertainty.predictive import Predictive, predictive

ABSENT = -1e6  # the logit of a choice that an input does not have


@dataclass(frozen=True)
class EncodedSet:
    """N examples as prompts. `num_choices` [N] may vary for multiple choice; `answers` [N] has -1 for none of them."""

    sequences: list[list[int]]
    answers: Tensor
    num_choices: Tensor


def encode_examples(prompter: Prompter, examples: Sequence[Example], max_tokens: int | None = None) -> EncodedSet:
    """Prompts of a data set for a task.

    Raises:
        DatasetError: a row whose choices are not the task's, or that cannot become a prompt, with file and line.
    """
    task = prompter.task
    sequences = []
    for example in examples:
        choices = None if task.kind == "classification" else example.choices
        if choices is None and example.choices != task.choices:
            raise DatasetError(
                f"{example.source}: the choices are {list(example.choices)}; the task has {list(task.choices)}"
            )
        try:
            sequences.append(prompter.encode(example.text, choices, max_tokens=max_tokens))
        except PromptError as error:
            raise DatasetError(f"{example.source}: {error}") from None
    return EncodedSet(
        sequences,
        torch.tensor([example.answer for example in examples]),
        torch.tensor([len(example.choices) for example in examples]),
    )


def batches(lengths: Sequence[int], num_samples: int, max_batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, each within rows * longest <= max_batch_tokens (at least one input)."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * num_samples * lengths[index] > max_batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def logits_of(
    model: ScalaBLModel,
    sequences: Sequence[Sequence[int]],
    draws: Draws,
    *,
    max_batch_tokens: int = 4096,
    on_progress: Callable[[int], object] | None = None,
    states: Callable[[Tensor, int], Tensor] | None = None,
) -> Tensor:
    """Logits [N, K, C] of N prompts in length-aware batches; `on_progress` hears how many inputs each batch finished.

    Args:
        states: of (indices [B], width T), the trunk's states [B, T, D] (`trunk_cache.TrunkCache.of`).
    """
    result = torch.empty(len(sequences), draws.num_samples, model.num_choices)
    for batch in batches([len(ids) for ids in sequences], draws.num_samples, max_batch_tokens):
        tokens = TokenBatch.of([sequences[i] for i in batch])
        kept = states(torch.tensor(batch), tokens.input_ids.shape[1]) if states is not None else None
        result[batch] = model.logits(tokens, draws, kept).cpu()
        if on_progress is not None:
            on_progress(len(batch))
    return result


def without_absent(logits: Tensor, num_choices: Tensor) -> Tensor:
    """[N, K, C], with the logits of choices that an input does not have put out of reach, at any usual temperature."""
    absent = torch.arange(logits.shape[-1]) >= num_choices.unsqueeze(1)  # [N, C]
    return logits.masked_fill(absent.unsqueeze(1), ABSENT)


def predictive_of(logits: Tensor, num_choices: Tensor, model: ScalaBLModel, draws: Draws) -> Predictive:
    """The predictive of N inputs, each over the choices that it has."""
    return predictive(without_absent(logits, num_choices), model.config.temperature, draws.scheme)


def scores(outcome: Predictive, answers: Tensor) -> dict[str, float]:
    """Every score of `scoring.labelled_scores` that there is: answers [N], each an index into the choices."""
    found = {name: float(value) for name, value in labelled_scores(outcome, answers).items()}
    return {name: value for name, value in found.items() if not math.isnan(value)}


def ood_scores(inside: Predictive, outside: Predictive) -> dict[str, float]:
    """AUROC with which each doubt score ranks the inputs of `outside` above those of `inside`, and the means outside."""
    return {name: float(value) for name, value in outside_scores(inside, outside).items()}
