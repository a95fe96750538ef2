"""The base model in 8 bits, beside the one in float32: for the brute-force part of `benchmarks.serving`.

python -m benchmarks.lower_precision --model <folder> [--adapter <folder>] is what it changes in answers, of the example's
adapter to the example's queries, and the time of both, batch by batch in turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import example
from benchmarks.machine import describe
from benchmarks.timing import in_turns, ratio, ratio_text
from scalabl.base.int8 import weight_levels
from scalabl.base.pretrained import load_pretrained
from scalabl.evaluation.precision_change import QuantizationChange
from scalabl.files.adapter_directory import load_adapter
from scalabl.model.posterior import Draws
from scalabl.model.token_batch import TokenBatch
from scalabl.passes.probes import find_shared_work
from scalabl.prompt import Prompter
from scalabl.uncertainty.predictive import Predictive, predictive


class Int8:
    """An adapter over a base model of its own, in 8 bits, with every shortcut that it can take."""

    def __init__(self, model: str, adapter: Path) -> None:
        self.model = load_adapter(load_pretrained(model, device="cpu", quantization="int8").model, adapter)
        find_shared_work(self.model)

    def run(self, sequences: Sequence[Sequence[int]], draws: Draws) -> Tensor:
        """[B, K, C]."""
        return self.model.logits(TokenBatch.of(sequences), draws)

    def change(self, logits: Tensor, sequences: Sequence[Sequence[int]], draws: Draws) -> QuantizationChange:
        """From the answers that these logits of the same inputs and draws are."""
        return QuantizationChange.between(
            self._predictive(logits, draws), self._predictive(self.run(sequences, draws), draws)
        )

    def _predictive(self, logits: Tensor, draws: Draws) -> Predictive:
        return predictive(logits, self.model.config.temperature, draws.scheme, draws.members)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="base model: a folder (examples.intent_router.base_model)")
    parser.add_argument("--adapter", type=Path, default=example.ADAPTER)
    parser.add_argument("--inputs", type=int, default=4, help="of a batch")
    parser.add_argument("--samples", type=int, default=16)
    options = parser.parse_args()
    pretrained = load_pretrained(options.model, device="cpu")
    plain, int8 = load_adapter(pretrained.model, options.adapter), Int8(options.model, options.adapter)
    prompter = Prompter(plain.config.task, pretrained.tokenizer)
    queries = [query for query in example.queries() if query.strip()]
    sequences = sorted((prompter.encode(query) for query in queries), key=len)
    draws = plain.draws(options.samples)
    print(f"{describe()}, {torch.get_num_threads()} threads; 8-bit weights up to {weight_levels()}")
    logits, seconds = [], {"float32": list[float](), "int8": list[float]()}
    for first in range(0, len(sequences), options.inputs):
        batch = TokenBatch.of(sequences[first : first + options.inputs])
        logits.append(plain.logits(batch, draws))
        int8.model.logits(batch, draws)  # warm
        passes = {
            "float32": partial(plain.logits, batch, draws),
            "int8": partial(int8.model.logits, batch, draws),
        }
        for name, times in in_turns(passes, 1).items():
            seconds[name] += times
    print(
        f"{len(sequences)} queries, {options.inputs} a batch, K = {options.samples}: "
        f"int8 {ratio_text(ratio(seconds['float32'], seconds['int8']))} times as fast as float32"
    )
    print(int8.change(torch.cat(logits), sequences, draws))


if __name__ == "__main__":
    main()
