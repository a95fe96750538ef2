"""Whether a vLLM server answers for an adapter exactly, with all of it, and as the others do: asked before it is used."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from scalabl.files.sample_loras import SampleLoras
from scalabl_server.engines.vllm.client import CallError, Models, VllmClient

SAME = 0.05  # by which probabilities of two servers may differ: rounding is far below it, another model far above
EXACT = 0.05  # nats by which two ways of asking one server may differ
PROBE_LENGTHS = (3, 8, 21)


@dataclass(eq=False)
class Examined:
    """The LoRAs of one adapter, and what the first server said to the probes.

    Attributes:
        answers: probabilities [names, probes, C], by which every other server is measured.
    """

    loras: SampleLoras
    answers: Tensor | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def tokens(self) -> tuple[int, ...]:
        tokens = self.loras.loras.config.task.choice_tokens
        assert tokens is not None  # `ScalaBLModel` sees to it
        return tokens

    def probes(self) -> list[list[int]]:
        return [[(7 * i + 3 * n) % self.loras.loras.vocabulary for i in range(n)] for n in PROBE_LENGTHS]


def examine(client: VllmClient, models: Models, adapter: Examined, folder: Path) -> None:
    """Give a server what it lacks of an adapter, and see whether it answers with all of it.

    Args:
        models: what it has.
        folder: where LoRAs are written for it.

    Raises:
        CallError: it does not; the cause says what is missing.
    """
    loras, probes = adapter.loras, adapter.probes()
    for name in loras.all_names:
        if name not in models.adapters:
            client.load(name, str(loras.write(folder, name).absolute()))
    plain = client.score(models.base, probes, adapter.tokens)
    likely = client.most_likely(models.base, probes[0], 5)
    named = client.score(models.base, probes[:1], list(likely))[0]
    if float((named - torch.tensor(list(likely.values()))).abs().max()) > EXACT:
        raise CallError("refused", "its log-probabilities of named tokens are not those of its most likely tokens")
    answers = []
    for name in loras.all_names:
        log_probabilities = client.score(name, probes, adapter.tokens)
        if torch.equal(log_probabilities, plain) and name in loras.parts:
            raise CallError("refused", f"it leaves out what the adapter does to {loras.parts[name]}")
        answers.append(torch.softmax(log_probabilities, -1))
    if all(torch.equal(probabilities, torch.softmax(plain, -1)) for probabilities in answers):
        raise CallError("refused", "the adapter changes nothing there")
    told = torch.stack(answers)
    with adapter.lock:
        if adapter.answers is None:
            adapter.answers = told
    difference = float((told - adapter.answers).abs().max())
    if not difference <= SAME:
        raise CallError(
            "refused",
            f"its probabilities differ by up to {difference:.2g} from those of the server that was examined first: it "
            "has another base model, or other LoRAs under these names",
        )
