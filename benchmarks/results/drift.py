"""The test martingale on real traffic: how often it raises a false alarm, and how soon it notices another kind of input.

python -m benchmarks.results.drift --model <folder> --data ../shared/data [--scores build/drift-scores.json]

Inputs are queries of CLINC150 that the example's adapter was not trained on, in random order, and out-of-scope queries.
Their novelty scores, at the posterior mean, are computed once and kept in a file.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.example import ADAPTER
from benchmarks.machine import describe
from scalabl.uncertainty.drift import DriftMartingale

CALIBRATION, LONG, BEFORE, AFTER = 500, 10_000, 2000, 500  # rows
LIMIT = 2.0  # decimal logarithm of 100


@dataclass(frozen=True)
class Scores:
    """Novelty scores of queries inside and outside of the adapter's topics."""

    inside: list[float]
    outside: list[float]


@dataclass(frozen=True)
class Found:
    """The outcome of many runs.

    Attributes:
        highest: of each run without a change, the highest decimal logarithm of the martingale.
        delays: of each run with a change, the number of inputs after it until the martingale passed 100; None if it did not.
    """

    highest: list[float]
    delays: list[int | None]

    @property
    def false_alarms(self) -> int:
        return sum(top > LIMIT for top in self.highest)

    @property
    def noticed(self) -> int:
        return sum(delay is not None for delay in self.delays)


def simulate(scores: Scores, runs: int, share: float = 0.2) -> Found:
    """Runs of 10,000 inputs without a change, and of 2,000 inputs followed by 500 of which a share is out of scope.

    Each run draws its calibration rows and its inputs at random, without repetition, and has a seed of its own.
    """
    inside, outside = np.array(scores.inside), np.array(scores.outside)
    highest: list[float] = []
    delays: list[int | None] = []
    for seed in range(runs):
        generator = np.random.default_rng(seed)
        order = inside[generator.permutation(len(inside))]
        calibration, traffic = order[:CALIBRATION].tolist(), order[CALIBRATION : CALIBRATION + LONG].tolist()
        martingale, top = DriftMartingale(calibration, seed), -math.inf
        for score in traffic:
            martingale.see(score)
            top = max(top, martingale.log10)
        highest.append(top)
        delays.append(_delay(calibration, traffic, generator.permutation(outside).tolist(), share, generator))
    return Found(highest, delays)


def _delay(
    calibration: Sequence[float],
    inside: Sequence[float],
    outside: Sequence[float],
    share: float,
    generator: np.random.Generator,
) -> int | None:
    martingale, others = DriftMartingale(calibration), iter(outside)
    for score in inside[:BEFORE]:
        martingale.see(score)
    for count, score in enumerate(inside[BEFORE : BEFORE + AFTER], start=1):
        martingale.see(next(others) if generator.random() < share else score)
        if martingale.log10 > LIMIT:
            return count
    return None


def scores_of(model: str, data: Path, file: Path, rows: int = CALIBRATION + LONG + 100) -> Scores:
    """The scores of random queries that the adapter was not trained on, from the file or else computed and kept there."""
    if file.is_file():
        return Scores(**json.loads(file.read_text(encoding="utf-8")))
    from scalabl.base.pretrained import load_pretrained
    from scalabl.evaluation.inference import readings_of
    from scalabl.files.adapter_directory import load_adapter, read_config
    from scalabl.files.novelty_file import read_novelty
    from scalabl.prompt import Prompter

    pretrained = load_pretrained(model)
    adapter = load_adapter(pretrained.model, ADAPTER)
    reference = read_novelty(ADAPTER, read_config(ADAPTER), adapter.state_width)
    assert reference is not None  # of the committed example
    prompter = Prompter(adapter.config.task, pretrained.tokenizer)

    def scored(texts: Sequence[str]) -> list[float]:
        states = readings_of(adapter, [prompter.encode(text) for text in texts], adapter.mean_draw()).states
        return [float(score) for score in reference.scores(states)]

    known = {row["text"] for row in _rows(data / "clinc10" / "train.jsonl")}
    files = [data / "clinc150" / f"{name}.jsonl" for name in ("train", "validation", "test")]
    new = sorted({row["text"] for path in files for row in _rows(path)} - known)
    chosen = np.random.default_rng(0).permutation(len(new))[:rows].tolist()
    outside = [row["text"] for row in _rows(data / "clinc_oos" / "test.jsonl")]
    scores = Scores(scored([new[place] for place in chosen]), scored(outside))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(vars(scores)), encoding="utf-8")
    return scores


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    """Compute and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="the example's base model")
    parser.add_argument("--data", type=Path, required=True, help="folder with clinc10, clinc150 and clinc_oos")
    parser.add_argument("--scores", type=Path, default=Path("build/drift-scores.json"), help="where scores are kept")
    parser.add_argument("--runs", type=int, default=100)
    options = parser.parse_args()
    scores = scores_of(options.model, options.data, options.scores)
    print(describe())
    found = simulate(scores, options.runs)
    print(
        f"{LONG} inputs in scope: {found.false_alarms} of {options.runs} runs pass 100, highest 10^{max(found.highest):.2f}"
    )
    known = sorted(delay for delay in found.delays if delay is not None)
    print(f"20% out of scope from input {BEFORE} on: {found.noticed} of {options.runs} runs pass 100 within {AFTER}")
    print(f"inputs until then: median {np.median(known):.0f}, 95% {np.quantile(known, 0.95):.0f}, most {known[-1]}")


if __name__ == "__main__":
    main()
