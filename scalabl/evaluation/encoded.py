"""A data set as token ids, with the answers and numbers of choices. Reading files is in `dataset`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from scalabl.config import NoveltyData
from scalabl.errors import DatasetError, PromptError
from scalabl.evaluation.dataset import Example
from scalabl.prompt import Prompter


@dataclass(frozen=True)
class EncodedSet:
    """N examples as token ids. `num_choices` [N] may vary in multiple choice; an answer [N] of -1 is none of the choices.

    `name` is the name of the file that the examples come from, for messages.
    """

    sequences: list[list[int]]
    answers: Tensor
    num_choices: Tensor
    name: str = "the data"

    @property
    def description(self) -> NoveltyData:
        """The data as `adapter_config.json` names it: the hash is that of token ids and answers, not of the file."""
        digest = hashlib.sha256()
        for ids, answer in zip(self.sequences, self.answers.tolist(), strict=True):
            digest.update(f"{answer} {' '.join(map(str, ids))}\n".encode())
        return NoveltyData(name=self.name, sha256=digest.hexdigest(), rows=len(self.sequences))


def encode_examples(prompter: Prompter, examples: Sequence[Example], max_tokens: int | None = None) -> EncodedSet:
    """The tokenised prompts of a data set for a task.

    Raises:
        DatasetError: a row's choices are not the task's, or it cannot become a prompt; the message gives file and line.
    """
    task = prompter.task
    sequences = []
    for example in examples:
        choices = None if task.kind == "classification" else example.choices
        if choices is None and example.choices != task.choices:
            raise DatasetError(
                f"{example.source}: the choices are {list(example.choices)}; they must be the task's, {list(task.choices)}"
            )
        try:
            sequences.append(prompter.encode(example.text, choices, max_tokens=max_tokens))
        except PromptError as error:
            raise DatasetError(f"{example.source}: {error}") from None
    return EncodedSet(
        sequences,
        torch.tensor([example.answer for example in examples]),
        torch.tensor([len(example.choices) for example in examples]),
        Path(examples[0].source.rpartition(":")[0]).name,
    )
