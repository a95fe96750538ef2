"""Running the jobs that draw samples, in rounds: one pass for all jobs, then one per round for those that need more.

Works with any engine: the engine passes a function that runs a pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from scalabl.model.posterior import Draws
from scalabl_server.batching.jobs import Job

# Runs one pass: (indices of inputs, the draws of each) -> the logits [K, C] of each on the CPU
RunSamples = Callable[[Sequence[int], Sequence[Draws]], Sequence[Tensor]]


def sample_in_rounds(run: RunSamples, jobs: Sequence[Job], temperatures: Sequence[float]) -> dict[int, Tensor]:
    """The logits [K, C] of each job that draws samples, by the job's index.

    Args:
        temperatures: of the jobs' adapters.
    """
    draws_of = {index: draws for index, job in enumerate(jobs) if (draws := job.first_draws()) is not None}
    logits_of: dict[int, Tensor] = {}
    while draws_of:
        for index, logits in zip(draws_of, run(list(draws_of), list(draws_of.values())), strict=True):
            logits_of[index] = torch.cat([logits_of[index], logits]) if index in logits_of else logits
        draws_of = {
            index: more
            for index in draws_of
            if (more := jobs[index].next_draws(logits_of[index], temperatures[index])) is not None
        }
    return logits_of
