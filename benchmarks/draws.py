"""Which draws come closest with few samples: RMS error at K samples of each scheme against a large reference.

python -m benchmarks.draws --adapter examples/intent_router/adapter --model <folder> --data <rows.jsonl> [--data ...]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.machine import describe
from scalabl.base.pretrained import load_pretrained
from scalabl.evaluation.dataset import read_examples
from scalabl.evaluation.encoded import encode_examples
from scalabl.evaluation.inference import logits_of
from scalabl.files.adapter_directory import load_adapter, read_config
from scalabl.model.posterior import SCHEMES, Scheme
from scalabl.prompt import Prompter
from scalabl.uncertainty.predictive import Predictive, predictive


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, action="append", required=True, help="JSONL rows; may be repeated")
    parser.add_argument("--inputs", type=int, default=16, help="rows of each file, evenly spaced")
    parser.add_argument("--num-samples", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--reference", type=int, default=1024, help="samples of the reference (antithetic, its own seed)")
    options = parser.parse_args()

    config = read_config(options.adapter)
    pretrained = load_pretrained(options.model)
    prompter = Prompter(config.task, pretrained.tokenizer)
    rows = []
    for path in options.data:
        examples = read_examples(path, labelled=False)
        rows += examples[:: max(1, len(examples) // options.inputs)][: options.inputs]
    sequences = encode_examples(prompter, rows).sequences
    model = load_adapter(pretrained.model, options.adapter)

    def outcome(num_samples: int, seed: int, scheme: Scheme) -> Predictive:
        draws = model.draws(num_samples, seed, scheme)
        return predictive(logits_of(model, sequences, draws), config.temperature, scheme)

    reference = outcome(options.reference, 10**9, "antithetic")
    print(describe())
    print(f"{len(rows)} inputs, K = {options.num_samples}, {options.seeds} seeds, reference of {options.reference} samples")
    print(f"{'scheme':<12}{'RMS error of probabilities':>28}{'of MI (nats)':>16}{'mean error of MI':>20}")
    for scheme in SCHEMES:
        estimates = [outcome(options.num_samples, seed, scheme) for seed in range(options.seeds)]
        probabilities = torch.stack([estimate.probabilities for estimate in estimates]) - reference.probabilities
        information = torch.stack([estimate.mutual_information for estimate in estimates]) - reference.mutual_information
        print(
            f"{scheme:<12}{_rms(probabilities):>28.5f}{_rms(information):>16.5f}{information.mean().item():>20.5f}",
            flush=True,
        )


def _rms(error: Tensor) -> float:
    return float(error.square().mean().sqrt())


if __name__ == "__main__":
    main()
