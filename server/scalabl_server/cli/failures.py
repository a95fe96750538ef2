"""Turns whatever a command raises into one line on standard error and an exit status. Used once, around all commands."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from scalabl.errors import ScalaBLError

TRACEBACK = "SCALABL_TRACEBACK"
FAILED, INTERRUPTED = 1, 130
# The base class of the errors that typer reports itself, with status 2; its name depends on typer's version.
USAGE: type[Exception] = next(
    kind for kind in reversed(typer.BadParameter.__mro__) if issubclass(kind, Exception) and kind is not Exception
)


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """Print an exception as one line without a traceback, and exit with a status that says what it was.

    * 1: the command failed. A `ScalaBLError` says what to do; an `OSError` names the file; `MemoryError`, and torch's errors
      about memory, say what to lower. Any other exception is a fault of the program: the line asks for a report, with the
      traceback that the environment variable `SCALABL_TRACEBACK=1` shows.
    * 2: wrong usage. typer prints these errors itself.
    * 130: Ctrl-C.

    A broken pipe is left to typer, which then ends with status 1 and prints nothing.
    """
    try:
        yield
    except (typer.Exit, typer.Abort, USAGE, BrokenPipeError):
        raise
    except KeyboardInterrupt:
        _end("interrupted", INTERRUPTED)
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        _end(_sentence(error), FAILED)


class Commands(TyperGroup):
    """The `scalabl` command, whose subcommands fail with one line."""

    def invoke(self, ctx: Any) -> Any:
        with errors_as_messages():
            return super().invoke(ctx)


def _end(sentence: str, status: int) -> NoReturn:
    typer.secho(f"error: {sentence}", fg="red", err=True)
    raise typer.Exit(status) from None


def _sentence(error: Exception) -> str:
    if isinstance(error, ScalaBLError):
        return str(error)
    kind, text = type(error).__name__, _first_line(error)
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError" or "not enough memory" in text:
        return f"there is not enough memory ({text or kind}); lower the number of samples, the batch size or the rank"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename} cannot be used: {error.strerror}" if error.filename is not None else error.strerror
    return (
        f"an unexpected {kind}: {text}. This is a fault of the program: please report it, with what the command prints when "
        f"the environment variable {TRACEBACK} is 1"
    )


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "")
