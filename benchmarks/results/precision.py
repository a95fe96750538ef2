"""Precision for cost: how far K samples, the linearisation and both together are from a large reference, and their time.

For one adapter that the study has trained.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import describe
from benchmarks.results.plan import Run
from benchmarks.results.saved import read_logits, save_logits, save_scores, scores_of
from benchmarks.results.study import Study, subset
from benchmarks.timing import in_turns
from scalabl.evaluation.encoded import EncodedSet
from scalabl.evaluation.inference import logits_of
from scalabl.files.adapter_directory import load_adapter
from scalabl.model.posterior import SCHEMES, Draws, Scheme, draw
from scalabl.model.token_batch import TokenBatch
from scalabl.passes.batches import batches
from scalabl.uncertainty.linearized import NEGLIGIBLE, Linearization, controlled, linearize
from scalabl.uncertainty.predictive import Predictive, predictive

COUNTS = (4, 8, 16, 32, 64, 128, 256)
CONTROLLED = (4, 8, 16, 32)
CONTROLLED_SCHEMES: tuple[Scheme, ...] = ("gaussian", "sobol")
SEED = 1
# of sigma: as trained, and where the linearisation has to fail -> (inputs, half of them from outside the choices; samples of
# the reference)
SCALES = {1.0: (200, 2048), 3.0: (40, 512)}
PASS_SAMPLES = 256  # held at once
TIMED_INPUTS = 16


class Precision:
    """Of one adapter at one scale of sigma."""

    def __init__(self, study: Study, run: Run, scale: float) -> None:
        self.study, self.scale = study, scale
        count, self.reference = SCALES[scale]
        self.made_from = study.made_from(run, precision={"scale": scale, "inputs": count, "reference": self.reference})
        self.folder = study.folder / f"precision {run.name} x{scale:g}"
        self.folder.mkdir(exist_ok=True)
        self.model = load_adapter(study.pretrained.model, study.folder / run.name)
        self.model.config = self.model.config.model_copy(update={"posterior_scale": scale})
        parts = [subset(study.sets[name], _spread(len(study.sets[name].answers), count // 2)) for name in ("test", "ood")]
        self.inputs = EncodedSet(
            [ids for part in parts for ids in part.sequences],
            torch.cat([part.answers for part in parts]),
            torch.cat([part.num_choices for part in parts]),
        )

    def logits(self, name: str, draws: Draws) -> Tensor:
        """[N, K, C], kept in the folder piece by piece."""
        pieces = []
        for start in range(0, draws.num_samples, PASS_SAMPLES):
            path = self.folder / f"{name} {start}.safetensors"
            if not path.is_file():
                part = dataclasses.replace(draws, epsilon=draws.epsilon[start : start + PASS_SAMPLES])
                save_logits(path, {"logits": logits_of(self.model, self.inputs.sequences, part)}, self.made_from)
            pieces.append(read_logits(path, self.made_from)["logits"])
        return torch.cat(pieces, dim=1)

    def linearization(self) -> list[tuple[list[int], Linearization]]:
        """Of all inputs, in batches, as (indices, their linearisation)."""
        lengths = [len(ids) for ids in self.inputs.sequences]
        linearizations = []
        for batch in batches(lengths, self.model.num_choices, 4096):
            tokens = TokenBatch.of([self.inputs.sequences[i] for i in batch])
            linearizations.append((batch, linearize(self.model, tokens, negligible=NEGLIGIBLE)))
        return linearizations

    def measure(self) -> dict[str, Any]:
        """RMS errors against the reference, saved."""
        saved = scores_of(f"precision x{self.scale:g}", self.made_from)
        if saved is not None:
            return saved
        dimension = self.model.num_stochastic_parameters
        truth = predictive(self.logits("reference", draw(10**9, self.reference, dimension, "antithetic")), 1.0, "antithetic")
        rows: list[dict[str, Any]] = []
        sampled: dict[Scheme, tuple[Draws, Tensor]] = {}
        for scheme in SCHEMES:
            draws = draw(SEED, max(COUNTS), dimension, scheme)
            logits = self.logits(f"{scheme} {SEED}", draws)
            sampled[scheme] = draws, logits
            for count in COUNTS:
                # Blocks of K of one sequence: independent for the first two schemes, nets of their own for Sobol.
                blocks = [
                    predictive(logits[:, start : start + count], 1.0, scheme) for start in range(0, max(COUNTS), count)
                ]
                rows.append({"method": f"MC, {scheme}", "num_samples": count, **_errors(blocks, truth)})
        linear = self.linearization()
        rows.append(
            {
                "method": "linearised",
                "num_samples": 0,
                **_errors([_gathered(linear, lambda one, _: one.predictive())], truth),
            }
        )
        for scheme in CONTROLLED_SCHEMES:
            draws, logits = sampled[scheme]
            for count in CONTROLLED:
                outcomes = [
                    _controlled(linear, logits, draws, slice(start, start + count))
                    for start in range(0, min(max(COUNTS), 8 * count), count)
                ]
                rows.append({"method": f"MC + control variate, {scheme}", "num_samples": count, **_errors(outcomes, truth)})
        result = {"scale": self.scale, "relative_spread": self.model.posterior().relative_spread, "rows": rows}
        save_scores(f"precision x{self.scale:g}", result, self.made_from)
        return result

    def time(self, rounds: int = 5) -> dict[str, Any]:
        """Seconds per input of each method, medians over interleaved rounds on a quiet machine."""
        some = subset(self.inputs, _spread(len(self.inputs.sequences), TIMED_INPUTS)).sequences
        sampling = {count: self.model.draws(count) for count in COUNTS}

        def linearised() -> None:
            for batch in batches([len(ids) for ids in some], self.model.num_choices, 4096):
                linear = linearize(self.model, TokenBatch.of([some[i] for i in batch]), negligible=NEGLIGIBLE)
                linear.predictive()

        methods: dict[str, Callable[[], object]] = {
            f"MC {count}": lambda draws=draws: logits_of(self.model, some, draws) for count, draws in sampling.items()
        }
        methods["linearised"] = linearised
        seconds = {
            name: [taken / len(some) for taken in times[1:]]  # the first round warms up
            for name, times in in_turns(methods, rounds + 1).items()
        }
        result = {
            "machine": describe(),
            "threads": torch.get_num_threads(),
            "seconds": {name: statistics.median(times) for name, times in seconds.items()},
            "range": {name: (min(times), max(times)) for name, times in seconds.items()},
        }
        save_scores("precision times", result, self.made_from)
        return result


def _spread(count: int, wanted: int) -> Tensor:
    return torch.arange(wanted) * count // wanted


def _gathered(
    linear: list[tuple[list[int], Linearization]], of: Callable[[Linearization, list[int]], Predictive]
) -> Predictive:
    outcomes = {i: outcome for batch, one in linear for i, outcome in _by_input(batch, of(one, batch))}
    return Predictive.stack([outcomes[i] for i in range(len(outcomes))])


def _by_input(batch: list[int], outcome: Predictive) -> list[tuple[int, Predictive]]:
    return [(i, outcome.of_input(row)) for row, i in enumerate(batch)]


def _controlled(linear: list[tuple[list[int], Linearization]], logits: Tensor, draws: Draws, block: slice) -> Predictive:
    part = dataclasses.replace(draws, epsilon=draws.epsilon[block])
    return _gathered(linear, lambda one, batch: controlled(logits[batch][:, block], one, part))


def _errors(outcomes: list[Predictive], truth: Predictive) -> dict[str, float]:
    probabilities = torch.stack([outcome.probabilities - truth.probabilities for outcome in outcomes])
    information = torch.stack([outcome.mutual_information - truth.mutual_information for outcome in outcomes])
    return {
        "probabilities": float(probabilities.square().mean().sqrt()),
        "mutual_information": float(information.square().mean().sqrt()),
        "mutual_information_bias": float(information.mean()),
    }
