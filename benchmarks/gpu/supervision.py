"""Runs functions in processes of their own, each with a time limit. What the functions measure is not known here.

Processes are forked. The process that forks has to leave CUDA alone and run no computation.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

GRACE = 5.0  # seconds between the request to end and the kill
PR_SET_PDEATHSIG = 1  # of Linux's prctl


def limited(work: Callable[[], None], seconds: float, log: Path | None = None) -> int | None:
    """Run `work` in a child process and wait for its end, but at most so many seconds; then end it and what it started.

    Args:
        log: a file to which the child's standard output and standard error are appended.

    Returns:
        0 if `work` returned, another number if it failed or died, None if the time was up.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        _be_the_child(work, parent, log)
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                _kill_group(child)  # what it may have left behind
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
    except BaseException:
        _end(child)
        raise
    _end(child)
    return None


def _be_the_child(work: Callable[[], None], parent: int, log: Path | None) -> None:
    """Run `work` and leave the process; never returns."""
    code = 1
    try:
        os.setsid()  # a group of its own, so that everything in it can be ended together
        signal.signal(signal.SIGTERM, _exit)  # as an exception, so that what it started is ended as well
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            raise SystemExit(1)
        if log is not None:
            with log.open("ab") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
        work()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _exit(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def _end(child: int) -> None:
    """Ask the child to end, then kill it and its group."""
    with suppress(ProcessLookupError):
        os.kill(child, signal.SIGTERM)
    deadline = time.monotonic() + GRACE
    ended = 0
    while not ended and time.monotonic() < deadline:
        ended, _ = os.waitpid(child, os.WNOHANG)
        time.sleep(0.02)
    _kill_group(child)
    if not ended:
        os.waitpid(child, 0)


def _kill_group(child: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
