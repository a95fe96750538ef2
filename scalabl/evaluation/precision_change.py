"""Measures how quantising the base model changes answers: the same inputs and draws before and after.

The quantisation itself is in `base`.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from pydantic import BaseModel, Field

from scalabl.base.int8 import to_int8
from scalabl.base.pretrained import Pretrained
from scalabl.config import Quantization, Task
from scalabl.evaluation.dataset import read_examples
from scalabl.evaluation.encoded import EncodedSet
from scalabl.evaluation.inference import logits_of, predictive_of
from scalabl.files.adapter_directory import load_adapter
from scalabl.model.attachment import Host
from scalabl.model.posterior import Draws
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.prompt import Prompter
from scalabl.uncertainty.predictive import Predictive

logger = logging.getLogger("scalabl")

# The default inputs, used for any adapter unless a file is given.
QUERIES = (
    "how do i change the address on my account",
    "The film was far too long, but the ending made up for it.",
    "which of these two would you choose, and why",
    "A train leaves at noon and arrives at ten past three.",
    "please cancel the order i placed yesterday",
    "what is the boiling point of water on a high mountain",
    "I am not sure whether this belongs here at all.",
    "turn the lights off when everybody has gone to bed",
)
OFFERED = ("yes", "no", "it depends", "that cannot be known")  # the choices of each query, for multiple-choice tasks


class Probes:
    """The probe inputs, which each adapter answers before and after quantisation.

    Args:
        file: a file for `dataset.read_examples`, whose answers are ignored; None for `QUERIES`.

    Raises:
        DatasetError: the file cannot be read or has an invalid row.
    """

    def __init__(self, file: Path | None = None) -> None:
        if file is None:
            self._inputs: list[tuple[str, tuple[str, ...]]] = [(text, OFFERED) for text in QUERIES]
        else:
            self._inputs = [(row.text, row.choices or OFFERED) for row in read_examples(file, labelled=False)]

    def encode(self, task: Task, prompter: Prompter, max_tokens: int) -> EncodedSet:
        """The inputs as prompts of a task; texts that are too long are cut."""
        offered = [None if task.kind == "classification" else choices[: len(task.choices)] for _, choices in self._inputs]
        sequences = [
            prompter.encode(text, choices, max_tokens=max_tokens, truncate=True)
            for (text, _), choices in zip(self._inputs, offered, strict=True)
        ]
        counts = [len(task.choices if choices is None else choices) for choices in offered]
        return EncodedSet(sequences, torch.full((len(sequences),), -1), torch.tensor(counts))

    def ask(self, model: ScalaBLModel, prompter: Prompter, max_tokens: int, draws: Draws) -> Predictive:
        """An adapter's predictive for the inputs."""
        encoded = self.encode(model.config.task, prompter, max_tokens)
        return predictive_of(logits_of(model, encoded.sequences, draws), encoded.num_choices, model, draws)


class QuantizationChange(BaseModel):
    """How much quantising the base model changes an adapter's answers to the probe inputs."""

    inputs: int = Field(description="Number of probe inputs.")
    num_samples: int = Field(description="Posterior samples for each input.")
    probability_largest: float = Field(description="Largest change of a choice's probability, over all choices and inputs.")
    probability_mean: float = Field(description="Each input's largest change of a probability, averaged over the inputs.")
    mutual_information_largest: float = Field(description="Largest change of an input's mutual information, in nats.")
    mutual_information_mean: float = Field(description="Mean change of mutual information over the inputs, in nats.")
    other_decisions: int = Field(description="Number of inputs for which another choice becomes the most probable one.")

    @classmethod
    def between(cls, before: Predictive, after: Predictive) -> QuantizationChange:
        """The change between two predictives of the same inputs."""
        probability = (after.probabilities - before.probabilities).abs().amax(-1)
        information = (after.mutual_information - before.mutual_information).abs()
        other_choice = after.probabilities.argmax(-1) != before.probabilities.argmax(-1)
        return cls(
            inputs=len(probability),
            num_samples=before.sample_probabilities.shape[1],
            probability_largest=float(probability.max()),
            probability_mean=float(probability.mean()),
            mutual_information_largest=float(information.max()),
            mutual_information_mean=float(information.mean()),
            other_decisions=int(other_choice.sum()),
        )

    def __str__(self) -> str:
        return (
            f"on {self.inputs} probe inputs and {self.num_samples} samples probabilities change by at most "
            f"{self.probability_largest:.2g} (mean {self.probability_mean:.2g}), mutual information by at most "
            f"{self.mutual_information_largest:.2g} nats (mean {self.mutual_information_mean:.2g}), and the most probable "
            f"choice of {self.other_decisions} inputs"
        )


def load_and_ask(
    load: Callable[[Quantization | None], Pretrained],
    quantization: Quantization,
    adapters: Mapping[str, Path],
    ask: Callable[[ScalaBLModel, Pretrained], Predictive],
) -> tuple[Pretrained, dict[str, Predictive]]:
    """Load a quantised base model; also returns each adapter's predictive on the base model before quantisation.

    If the base model does not fit into memory without quantization, there are no such predictives, and this is logged.

    Args:
        load: loads the base model with this quantization, or without any (None).
        adapters: name -> adapter directory.
        ask: computes an adapter's predictive for the probe inputs; see `Probes.ask`.

    Raises:
        AdapterError, BaseModelError: an adapter or the base model cannot be loaded.
    """
    before: dict[str, Predictive] = {}
    try:
        pretrained = load(None)
        for name, folder in adapters.items():
            model = load_adapter(pretrained.model, folder)
            before[name] = ask(model, pretrained)
            model.detach()
            del model
        Host.forget(pretrained.model)
    except torch.OutOfMemoryError:
        before.clear()
        logger.warning(
            "the base model does not fit into memory without --quantization: the change of answers is not measured"
        )
    else:
        if quantization == "int8":
            to_int8(pretrained.model)
            return pretrained, before
        del pretrained
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return load(quantization), before
