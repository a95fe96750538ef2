"""Sampling in rounds: which jobs are in which pass, and with which draws."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scalabl_server.batching.jobs import AdaptiveJob, ControlVariateJob, LinearizedJob, SampledJob
from scalabl_server.engines.rounds import sample_in_rounds

from scalabl.model.forward_pass import Reading
from scalabl.model.posterior import Draws, draw
from scalabl.uncertainty.adaptive import Rule


def test_one_pass_for_all_and_one_for_each_round_of_those_that_go_on() -> None:
    passes: list[dict[int, Draws]] = []

    def run(indices: Sequence[int], draws: Sequence[Draws]) -> list[Reading]:
        passes.append(dict(zip(indices, draws, strict=True)))
        # Of input 3 all samples agree; those of the others never do.
        rows = {3: [[3.0, -3.0]]}
        return [
            Reading(
                torch.tensor(rows.get(index, [[1.0, -1.0], [-1.0, 1.0]])).repeat(8, 1)[: table.num_samples],
                torch.full((3,), float(len(passes))),
            )
            for index, table in zip(indices, draws, strict=True)
        ]

    many, few = draw(0, 16, 5), draw(0, 8, 5)
    rule = Rule(most=16)
    jobs = [
        SampledJob(few, 2), LinearizedJob(2, 2), AdaptiveJob(many, 2, rule), AdaptiveJob(many, 2, rule),
        ControlVariateJob(draw(1, 8, 5), 2, 2), AdaptiveJob(many, 2, rule),
    ]  # fmt: skip
    readings = sample_in_rounds(run, jobs, [1.0] * len(jobs))
    assert [list(draws_of) for draws_of in passes] == [[0, 2, 3, 4, 5], [2, 5]]
    assert {index: len(reading.logits) for index, reading in readings.items()} == {0: 8, 2: 16, 3: 8, 4: 8, 5: 16}
    states = {index: float(reading.state[0]) for index, reading in readings.items()}
    assert states == {0: 1, 2: 1.5, 3: 1, 4: 1, 5: 1.5}, "a state is the mean over the samples of all rounds"
    first, second = passes
    assert len({first[index].key for index in (0, 2, 3, 5)}) == 1, "the first 8 of 16 draws are the 8 of the same seed"
    assert first[4].key != first[0].key
    assert second[2].key == second[5].key
    assert torch.equal(second[2].epsilon, many.epsilon[8:])


def test_without_samples_there_is_no_pass() -> None:
    def run(indices: Sequence[int], draws: Sequence[Draws]) -> list[Reading]:
        raise AssertionError("nothing is to be sampled")

    assert sample_in_rounds(run, [LinearizedJob(2, 2)], [1.0]) == {}
