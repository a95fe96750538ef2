"""K posterior samples as K requests to a vLLM server, each for a LoRA of its own: what one would do without a gateway.

Starting the server is in `benchmarks.processes`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from scalabl_server.engines.vllm.client import VllmClient
from torch import Tensor

from benchmarks.processes.vllm import Vllm
from scalabl.base.pretrained import load_skeleton
from scalabl.files.sample_loras import SampleLoras
from scalabl.model.posterior import DEFAULT_SCHEME
from scalabl.prompt import Prompter

TIMEOUT = 600.0
ROOM = 32  # tokens of a prompt beyond the longest that is asked


@dataclass(frozen=True)
class VllmPeer:
    """A server that has the LoRAs."""

    client: VllmClient
    names: Sequence[str]
    tokens: Sequence[int]

    def run(self, sequences: Sequence[Sequence[int]], num_samples: int) -> Tensor:
        """K requests at once, of B prompts each: [B, K, C], log-probabilities where the others give logits."""
        with ThreadPoolExecutor(num_samples) as clients:
            requests = [clients.submit(self.client.score, name, sequences, self.tokens) for name in self.names[:num_samples]]
            return torch.stack([request.result() for request in requests], dim=1)


@contextmanager
def vllm_peer(
    python: str, adapter: Path, model: str, prompter: Prompter, *, num_samples: int, longest: int
) -> Iterator[VllmPeer]:
    """A vLLM server on this machine with K LoRAs, until the context ends.

    Args:
        python: of the environment that has vLLM.
        longest: tokens of the longest prompt.
    """
    assert prompter.choice_tokens is not None  # resolved when the adapter was made
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        skeleton = load_skeleton(model)[0]
        loras = SampleLoras.read(adapter, skeleton, num_samples=num_samples, seed=0, scheme=DEFAULT_SCHEME)
        modules = [f"{name}={loras.write(folder / 'loras', name)}" for name in loras.names]
        server = Vllm(
            Path(model),
            folder / "vllm.log",
            python,
            modules,
            max_loras=num_samples,
            max_tokens=longest + ROOM,
            more=("--no-enable-prefix-caching",),  # the same prompts come again and again
        )
        with server.up():
            client = VllmClient(server.url, None, TIMEOUT)
            try:
                yield VllmPeer(client, loras.names, list(prompter.choice_tokens))
            finally:
                client.close()
