"""Folders that commands write an adapter into: what an earlier command left there, how it is removed, how it is replaced.

Which training run a folder belongs to is in `training.run_folder`; the adapter's own files are in `adapter_directory`.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from scalabl.config import AdapterConfig
from scalabl.errors import OutputError
from scalabl.files.adapter_directory import CONFIG_FILE, NOVELTY_FILE, WEIGHTS_FILE, save_adapter
from scalabl.files.atomic import SCRATCH, new_folder

RUN_FILE = "training_run.json"
CHECKPOINTS = "checkpoints"
FIT_STATE = "posterior_fit.safetensors"  # in the checkpoints: what a fit of a posterior has computed so far
LOGS = "runs"
MEMBERS = "members"  # of a mixture: a folder for each training run
REMEDY = "choose another --output, or add --overwrite to start anew"


def check_folder(folder: Path) -> None:
    """Check that a path is a folder, or may become one.

    Raises:
        OutputError: the path, or a part of it, is a file or something else.
    """
    present = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not present.is_dir():
        raise OutputError(f"{present} is not a folder; choose another --output")


def check_unused(folder: Path, *, overwrite: bool) -> None:
    """Check that a new adapter may be written to a folder.

    Raises:
        OutputError: the folder is not empty and `overwrite` is false, or it is no folder.
    """
    check_folder(folder)
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise OutputError(f"{folder} is not empty; choose another --output, or add --overwrite to replace the adapter in it")


def holds_adapter_or_checkpoints(folder: Path) -> bool:
    """Whether an adapter, a part of one or a checkpoint is in the folder."""
    return any((folder / name).exists() for name in (CONFIG_FILE, WEIGHTS_FILE)) or bool(_checkpoints(folder))


def remove_adapter(folder: Path) -> None:
    """Remove adapter, checkpoints, logs and record of a training run, and the runs of its members. Other files stay.

    The record goes first: if the process is killed half way, what is left belongs to no run and is never resumed.

    Raises:
        OutputError: something cannot be removed.
    """
    with write_errors(folder):
        for name in (RUN_FILE, CONFIG_FILE, WEIGHTS_FILE, NOVELTY_FILE):
            (folder / name).unlink(missing_ok=True)
        for checkpoint in _checkpoints(folder):
            shutil.rmtree(checkpoint)
        (folder / CHECKPOINTS / FIT_STATE).unlink(missing_ok=True)
        for log in (folder / LOGS).glob("events.out.tfevents.*"):
            log.unlink()
        for record in (folder / MEMBERS).glob(f"*/{RUN_FILE}"):
            shutil.rmtree(record.parent)


def write_adapter(folder: Path, config: AdapterConfig, weights: Mapping[str, Tensor], *, overwrite: bool = False) -> None:
    """Write an adapter directory as a whole or not at all. With `overwrite` the old adapter stays until then.

    Raises:
        OutputError: as for `check_unused`, or the folder cannot be written.
    """
    check_unused(folder, overwrite=overwrite)
    with write_errors(folder):
        if not folder.is_dir():
            with new_folder(folder) as draft:
                save_adapter(draft, config, weights)
            return
        with tempfile.TemporaryDirectory(dir=folder, prefix=SCRATCH) as scratch:
            save_adapter(Path(scratch), config, weights)
            remove_adapter(folder)
            _move_adapter(Path(scratch), folder)


def replace_adapter(folder: Path, config: AdapterConfig, weights: Mapping[str, Tensor]) -> None:
    """Replace the adapter in a folder by another one, once that is complete. Everything else in the folder stays, except for
    the novelty reference of the old one if the new one has none.

    Raises:
        OutputError: the folder cannot be written.
    """
    with write_errors(folder), tempfile.TemporaryDirectory(dir=folder, prefix=SCRATCH) as scratch:
        save_adapter(Path(scratch), config, weights)
        _move_adapter(Path(scratch), folder)
        if config.novelty is None:
            (folder / NOVELTY_FILE).unlink(missing_ok=True)


def _move_adapter(draft: Path, folder: Path) -> None:
    for name in (WEIGHTS_FILE, CONFIG_FILE):  # the configuration last: without one a folder is not read as an adapter
        os.replace(draft / name, folder / name)


@contextmanager
def write_errors(folder: Path) -> Iterator[None]:
    """What the file system refuses is an `OutputError`.

    Raises:
        OutputError: the block raised an OSError.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(f"{folder} cannot be written: {error.strerror or error}") from error


def _checkpoints(folder: Path) -> list[Path]:
    return list((folder / CHECKPOINTS).glob("checkpoint-*"))
