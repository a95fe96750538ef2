"""Examining a vLLM server before it is used: it must answer exactly, apply the whole adapter, and agree with the others."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from scalabl.files.sample_loras import SampleLoras
from scalabl_server.engines.vllm.client import CallError, Models, VllmClient

SAME = 0.05  # the most that probabilities of two servers may differ; rounding is far below it, another model far above
EXACT = 0.05  # the most that log-probabilities from two ways of asking one server may differ, in nats
PROBE_LENGTHS = (3, 8, 21)


@dataclass(eq=False)
class Examined:
    """The LoRAs of one adapter, and the answers of the first examined server to the probe prompts.

    Attributes:
        answers: probabilities [LoRAs, probes, C], with which every other server is compared; None before the first.
    """

    loras: SampleLoras
    answers: Tensor | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def tokens(self) -> tuple[int, ...]:
        tokens = self.loras.loras.config.task.choice_tokens
        assert tokens is not None  # set by `ScalaBLModel`
        return tokens

    def probes(self) -> list[list[int]]:
        return [[(7 * i + 3 * n) % self.loras.loras.vocabulary for i in range(n)] for n in PROBE_LENGTHS]


def examine(client: VllmClient, models: Models, adapter: Examined, folder: Path) -> None:
    """Make a server load the LoRAs of an adapter that it lacks, and check its answers with all of them.

    Args:
        models: the models that the server has.
        folder: where LoRAs are written for the server.

    Raises:
        CallError: the server cannot be used; the cause says why.
    """
    loras, probes = adapter.loras, adapter.probes()
    for name in loras.all_names:
        if name not in models.adapters:
            client.load(name, str(loras.write(folder, name).absolute()))
    plain = client.score(models.base, probes, adapter.tokens)
    likely = client.most_likely(models.base, probes[0], 5)
    named = client.score(models.base, probes[:1], list(likely))[0]
    if float((named - torch.tensor(list(likely.values()))).abs().max()) > EXACT:
        raise CallError("refused", "its log-probabilities of requested tokens differ from those of its most likely tokens")
    answers = []
    for name in loras.all_names:
        log_probabilities = client.score(name, probes, adapter.tokens)
        if torch.equal(log_probabilities, plain) and name in loras.parts:
            raise CallError("refused", f"it does not apply the adapter's change of {loras.parts[name]}")
        answers.append(torch.softmax(log_probabilities, -1))
    if all(torch.equal(probabilities, torch.softmax(plain, -1)) for probabilities in answers):
        raise CallError("refused", "its answers are the same with and without the adapter")
    probabilities_of_all = torch.stack(answers)
    with adapter.lock:
        if adapter.answers is None:
            adapter.answers = probabilities_of_all
    difference = float((probabilities_of_all - adapter.answers).abs().max())
    if not difference <= SAME:
        raise CallError(
            "refused",
            f"its probabilities differ by up to {difference:.2g} from those of the server that was examined first: it "
            "has another base model, or other LoRAs under the same names",
        )
