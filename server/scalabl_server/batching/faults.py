"""What a failed pass means: out of memory, a device or engine gone, or one input's own error; what clients are told."""

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
        """Whether every later pass will fail too: an accelerator's error stays until the process ends."""
        return self.kind == "device"

    @property
    def of_one_input(self) -> bool:
        """Whether a part of the batch may do better than the whole."""
        return self.kind in ("out-of-memory", "error")

    def problem(self, length: int, rows: int) -> ProblemError:
        """What the client of the input that fails on its own is told; its cause is for the log."""
        if isinstance(self.error, ProblemError):
            return self.error
        if self.kind == "out-of-memory":
            problem = ProblemError(
                "out-of-memory",
                f"an input of {length} tokens x {rows} samples does not fit in this server's memory; shorten it or "
                "lower num_samples. Its operator can lower --max-batch-tokens",
            )
        else:
            problem = ProblemError("internal-error", "the model failed on this input; the server's log has it")
        problem.__cause__ = self.error
        return problem


def classify(error: Exception) -> Failure:
    """The kind of an error that a pass raised."""
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
