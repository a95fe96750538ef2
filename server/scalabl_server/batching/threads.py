"""Which threads may have torch use more than one core: the model's alone.

libgomp gives every thread that computes in parallel a pool of threads of its own. Once these are more than there are cores,
none of them spins between two operations any more, and each operation of a pass begins with waking one: SmolLM2-135M's
passes over 1,000 tokens then take 13% longer. One softmax over ten numbers in another thread is enough.

After a pass its threads spin for milliseconds more in the hope of another. On two cores what has to be done with the results
then waits for a core, now and then for 3 ms.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Returned = TypeVar("Returned")

TORCH_THREADS = torch.get_num_threads()  # as torch has it before any thread says otherwise


def take_cores(count: int | None) -> None:
    """Have the calling thread compute on so many cores, or on as many as torch finds; first of all threads."""
    _keep_to(count or TORCH_THREADS)


def leave_cores() -> None:
    """Have the calling thread compute on one core: for the initializer of an executor, and the event loop."""
    _keep_to(1)


def _keep_to(count: int) -> None:
    # A thread that has asked torch for nothing yet takes the number over that any thread said last, also after its own word.
    torch.get_num_threads()
    torch.set_num_threads(count)


RESTING = 8  # threads up to which `rest` costs little beside a pass: ending and beginning each takes 0.1 ms or so


def rest() -> None:
    """End the threads that the calling one has computed with; its next computation begins others."""
    if PAUSE is not None and 1 < torch.get_num_threads() <= RESTING:
        PAUSE(1)  # omp_pause_soft, OpenMP 5.0, section 3.2.44


def _find_pause() -> Callable[[int], int] | None:
    """`omp_pause_resource_all` of the libgomp that torch has loaded, which ends threads; None where there is none."""
    if not hasattr(os, "RTLD_NOLOAD"):
        return None
    try:
        library = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        # LLVM's library under this name only lets them sleep.
        return None if hasattr(library, "__kmpc_fork_call") else library.omp_pause_resource_all
    except (OSError, AttributeError):
        return None


PAUSE = _find_pause()


class OneAtATime(ThreadPoolExecutor):
    """One thread, for what must not run twice at once, which another thread may do itself while this one is idle."""

    def __init__(self, name: str) -> None:
        super().__init__(1, thread_name_prefix=name, initializer=leave_cores)
        self._running = threading.Lock()

    def submit(
        self, fn: Callable[Arguments, Returned], /, *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Future[Returned]:
        """Have the thread call `fn`."""

        def alone() -> Returned:
            with self._running:
                return fn(*args, **kwargs)

        return super().submit(alone)

    def call(
        self, fn: Callable[Arguments, Returned], /, *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Returned | None:
        """Call it on the calling thread; None, and no call, while the executor's thread is at work."""
        if not self._running.acquire(blocking=False):
            return None
        try:
            return fn(*args, **kwargs)
        finally:
            self._running.release()
