"""`scalabl serve` with passes that fail in real ways on inputs that name the fault."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence

import torch
from scalabl_server.batching.jobs import Job, Result
from scalabl_server.cli.main import app
from scalabl_server.engines.interface import Served
from scalabl_server.engines.transformers_engine import TransformersEngine

EXCEPTION, OUT_OF_MEMORY, STUCK, DEAD = "exception", "out of memory", "stuck", "dead"

_run = TransformersEngine.run


class WorkerDeath(BaseException):
    """What no handler of errors catches."""


def _faulty(
    self: TransformersEngine, served: Served, sequences: Sequence[Sequence[int]], jobs: Sequence[Job]
) -> list[Result]:
    texts = [self.pretrained.tokenizer.decode(ids) for ids in sequences]
    if any(f"!{EXCEPTION}!" in text for text in texts):
        raise ValueError("secret of /some/path")
    if any(f"!{OUT_OF_MEMORY}!" in text for text in texts):
        torch.empty(2**50)
    if any(f"!{STUCK}!" in text for text in texts):
        threading.Event().wait()
    if any(f"!{DEAD}!" in text for text in texts):
        raise WorkerDeath
    return _run(self, served, sequences, jobs)


TransformersEngine.run = _faulty  # type: ignore[method-assign]  # the fault is injected where a device would have it

if __name__ == "__main__":
    sys.exit(app())
