"""Writing a file or a folder that appears whole or not at all. What goes into it is up to the caller.

Imports nothing heavy, so that scripts can use it before torch is there.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SCRATCH = ".writing-"  # how the names of unfinished work begin; a killed process may leave one behind


def write_file(path: Path, content: bytes) -> None:
    """Write or replace a file. Whoever reads it meanwhile sees the old content or the new one, never a part.

    Its permissions are those of any new file, which a temporary file's are not. The file's folder must exist.
    """
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=SCRATCH) as scratch:
        draft = Path(scratch) / path.name
        draft.write_bytes(content)
        os.replace(draft, path)


@contextmanager
def new_folder(folder: Path, *, keep_existing: bool = False) -> Iterator[Path]:
    """An empty folder to write into. When the block ends it becomes `folder`; after an error it is removed.

    Args:
        folder: its parents are made. It must not exist by the end of the block, unless it is empty.
        keep_existing: where another process has made `folder` meanwhile, that one stays and this one is removed.

    Raises:
        OSError: `folder` exists, and `keep_existing` is false.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=SCRATCH) as scratch:
        draft = Path(scratch) / folder.name
        draft.mkdir()  # the temporary folder itself could be read by its owner only
        yield draft
        try:
            os.rename(draft, folder)
        except OSError:
            if not (keep_existing and folder.is_dir()):
                raise
