"""Running the jobs that draw samples, in rounds: one pass for all jobs, then one per round for those that need more.

Works with any engine: the engine passes a function that runs a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from scalabl.model.forward_pass import Reading
from scalabl.model.posterior import Draws
from scalabl_server.batching.jobs import Job

# Runs one pass: (indices of inputs, the draws of each) -> what it computes for each, on the CPU
RunSamples = Callable[[Sequence[int], Sequence[Draws]], Sequence[Reading]]


def sample_in_rounds(run: RunSamples, jobs: Sequence[Job], temperatures: Sequence[float]) -> dict[int, Reading]:
    """Logits and hidden state of each job that draws samples, by the job's index.

    Args:
        temperatures: of the jobs' adapters.
    """
    draws_of = {index: draws for index, job in enumerate(jobs) if (draws := job.first_draws()) is not None}
    readings: dict[int, Reading] = {}
    while draws_of:
        for index, reading in zip(draws_of, run(list(draws_of), list(draws_of.values())), strict=True):
            readings[index] = readings[index].and_then(reading) if index in readings else reading
        draws_of = {
            index: more
            for index in draws_of
            if (more := jobs[index].next_draws(readings[index].logits, temperatures[index])) is not None
        }
    return readings
