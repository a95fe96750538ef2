"""Atomic writing: a file or a folder appears complete or not at all. The caller decides what goes into it.

This module imports nothing heavy, so that scripts can use it before torch is installed.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SCRATCH = ".writing-"  # prefix of unfinished files and folders; a killed process may leave one behind


def write_file(path: Path, content: bytes) -> None:
    """Write or replace a file. A reader sees either the old content or the new one, never a part.

    The file gets the permissions of an ordinary new file, not those of a temporary one. Its folder must exist.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=SCRATCH) as scratch:
        draft = Path(scratch) / path.name
        draft.write_bytes(content)
        os.replace(draft, path)


@contextmanager
def new_folder(folder: Path, *, keep_existing: bool = False) -> Iterator[Path]:
    """Yields an empty temporary folder to write into. When the block ends it is renamed to `folder`, or removed on error.

    Args:
        folder: the final name; missing parents are created. It must not exist when the block ends, unless it is empty.
        keep_existing: if another process has created `folder` meanwhile, keep that one and remove the temporary one.

    Raises:
        OSError: `folder` exists, and `keep_existing` is false.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=SCRATCH) as scratch:
        draft = Path(scratch) / folder.name
        draft.mkdir()  # a subfolder: only the owner could read the temporary folder itself
        yield draft
        try:
            os.rename(draft, folder)
        except OSError:
            if not (keep_existing and folder.is_dir()):
                raise
