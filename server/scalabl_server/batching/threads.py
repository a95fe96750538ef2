"""CPU threads: only the model thread may let torch compute on several cores; all others compute on one.

libgomp creates a pool of threads for every thread that computes in parallel. Once there are more pool threads than cores,
they sleep instead of spinning between two operations, and each operation of a pass must wake them first: passes of
SmolLM2-135M over 1,000 tokens take 13% longer. A single softmax over ten numbers in another thread is enough to cause it.

After a pass the pool threads spin for some milliseconds, waiting for more work. On two cores the processing of the results
then waits for a free core, sometimes for 3 ms. `rest` prevents that.
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

TORCH_THREADS = torch.get_num_threads()  # torch's default, read before any thread changes it


def take_cores(count: int | None) -> None:
    """Let the calling thread compute on `count` cores; None is torch's default. Call it before any other thread computes."""
    _keep_to(count or TORCH_THREADS)


def leave_cores() -> None:
    """Let the calling thread compute on one core only. Used by executors as initializer, and by the event loop's thread."""
    _keep_to(1)


def _keep_to(count: int) -> None:
    # A thread that has not used torch yet would later overwrite its own setting with that of the thread which set it last.
    # Calling torch once first avoids that.
    torch.get_num_threads()
    torch.set_num_threads(count)


RESTING = 8  # `rest` is used up to this many threads: ending and starting each takes about 0.1 ms, little next to a pass


def rest() -> None:
    """End the pool threads of the calling thread. Its next parallel computation starts new ones."""
    if PAUSE is not None and 1 < torch.get_num_threads() <= RESTING:
        PAUSE(1)  # omp_pause_soft, OpenMP 5.0, section 3.2.44


def _find_pause() -> Callable[[int], int] | None:
    """The function `omp_pause_resource_all` of the libgomp that torch has loaded; None if there is no libgomp."""
    if not hasattr(os, "RTLD_NOLOAD"):
        return None
    try:
        library = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        # LLVM's OpenMP library under this name does not end the threads, it only lets them sleep.
        return None if hasattr(library, "__kmpc_fork_call") else library.omp_pause_resource_all
    except (OSError, AttributeError):
        return None


PAUSE = _find_pause()


class OneAtATime(ThreadPoolExecutor):
    """An executor with one thread, for work that is not thread-safe. Another thread may do such work itself with `call`."""

    def __init__(self, name: str) -> None:
        super().__init__(1, thread_name_prefix=name, initializer=leave_cores)
        self._running = threading.Lock()

    def submit(
        self, fn: Callable[Arguments, Returned], /, *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Future[Returned]:
        """Call `fn` on the executor's thread."""

        def alone() -> Returned:
            with self._running:
                return fn(*args, **kwargs)

        return super().submit(alone)

    def call(
        self, fn: Callable[Arguments, Returned], /, *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Returned | None:
        """Call `fn` at once on the calling thread. Returns None without calling it while the executor's thread is busy."""
        if not self._running.acquire(blocking=False):
            return None
        try:
            return fn(*args, **kwargs)
        finally:
            self._running.release()
