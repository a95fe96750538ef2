"""What the C library does with memory that a pass on a CPU frees.

A pass takes and frees tensors of many megabytes. By default glibc gives such memory back to the system, and each page of the
next tensor is a fault: a sixth of the time of SmolLM2-135M's pass over 2,800 tokens.
"""

from __future__ import annotations

import ctypes
import os
import platform

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST = (2**30, 2**25)  # of what is kept; older versions take no more than the second
OPERATOR_SAYS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")


def keep_freed_memory() -> bool:
    """Have this process keep what it frees, for the next pass: it then holds what its largest pass took.

    Returns:
        Whether it does: not where the C library is another one, nor where the environment sets its allocator otherwise.
    """
    chosen = any(name in os.environ for name in OPERATOR_SAYS) or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")
    if chosen or platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    keeps = any(library.mallopt(M_MMAP_THRESHOLD, size) == 1 for size in LARGEST)
    return keeps and library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1) == 1
