"""Memory that is freed stays with the process, unless the environment says otherwise."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from scalabl.base.heap import keep_freed_memory

def use():
    return [torch.ones(tokens, 2**20) for tokens in (9, 10, 11)]  # 36 to 44 MiB each

kept = keep_freed_memory() if sys.argv[1] == "kept" else None
for _ in range(20):  # until the heap has a place for each
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    use()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(how: str, **environment: str) -> tuple[str, int]:
    known = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    command = [sys.executable, "-c", FAULTS, how]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=known | environment).stdout
    kept, faults = output.split()
    return kept, int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is asked")
def test_what_is_freed_is_kept_for_the_next_pass() -> None:
    _, before = _faults("by default")
    kept, after = _faults("kept")
    assert kept == "True"
    assert before > 10_000  # 5 x 120 MiB, in pages of 4 KiB or of up to 64
    assert after < before / 50


@pytest.mark.parametrize(
    "said", [{"MALLOC_MMAP_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}]
)
def test_an_allocator_that_the_environment_sets_is_left_alone(said: dict[str, str]) -> None:
    kept, _ = _faults("kept", **said)
    assert kept == "False"
