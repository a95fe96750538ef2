"""Classifying the error of a failed pass (memory, device, engine, or an input's own error) and telling the client."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from scalabl_server.observe.metrics import PassFailure
from scalabl_server.problems import ProblemError

NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "cannot allocate memory")


@dataclass(frozen=True)
class Failure:
    """Why a pass failed."""

    kind: PassFailure
    error: Exception

    @property
    def lasting(self) -> bool:
        """Whether every later pass will fail too: an error of the accelerator lasts until the process ends."""
        return self.kind == "device"

    @property
    def of_one_input(self) -> bool:
        """Whether a single input may be the cause, so that the rest of the batch may succeed without it."""
        return self.kind in ("out-of-memory", "error")

    def problem(self, length: int, rows: int) -> ProblemError:
        """The problem for the client whose input failed. Its `__cause__` is the original error, for the log.

        Args:
            length: of the input in tokens.
            rows: of the input in the pass.
        """
        if isinstance(self.error, ProblemError):
            return self.error
        if self.kind == "out-of-memory":
            problem = ProblemError(
                "out-of-memory",
                f"an input of {length} tokens x {rows} samples does not fit in this server's memory; shorten the input or "
                "lower num_samples. The operator can lower --max-batch-tokens",
            )
        else:
            problem = ProblemError("internal-error", "the model failed on this input; the server's log has the details")
        problem.__cause__ = self.error
        return problem


def classify(error: Exception) -> Failure:
    """The kind of failure that an error from a pass stands for."""
    if isinstance(error, ProblemError):
        return Failure("engine", error)
    text = str(error).lower()
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in text for words in NO_MEMORY)
    ):
        return Failure("out-of-memory", error)
    if isinstance(error, torch.AcceleratorError):
        return Failure("device", error)
    return Failure("error", error)
