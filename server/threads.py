"""Which threads may have torch use more than one core: the model's alone.

libgomp gives every thread that computes in parallel a pool of threads of its own. Once these are more than there are cores,
none of them spins between two operations any more, and each operation of a pass begins with waking one: SmolLM2-135M's
passes over 1,000 tokens then take 13% longer. One softmax over ten numbers in another thread is enough.
"""

from __future__ import annotations

import torch

FOUND = torch.get_num_threads()  # as torch has it before any thread says otherwise


def take_cores(count: int | None) -> None:
    """Have the calling thread compute on so many cores, or on as many as torch finds; first of all threads."""
    # Said even where it changes nothing: a thread that has said nothing follows whichever thread spoke last.
    torch.set_num_threads(count or FOUND)


def leave_cores() -> None:
    """Have the calling thread compute on one core: for the initializer of an executor, and the event loop."""
    torch.set_num_threads(1)
