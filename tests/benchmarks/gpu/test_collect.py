"""What is carried to a machine with a GPU has to fit: the check of the sizes."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu.collect import FOLDER_LIMIT, ROOT, TREE_LIMIT, files_of, size_of, too_large

MIB = 2**20


@pytest.mark.parametrize(
    ("carried", "tracked", "word"),
    [(60, 4, None), (60, 5, "the repository and the carried folder"), (61, 0, "the carried folder has"), (0, 64, None)],
)
def test_too_much_is_refused_with_its_size(carried: int, tracked: int, word: str | None) -> None:
    assert (FOLDER_LIMIT, TREE_LIMIT) == (60 * MIB, 64 * MIB)
    problem = too_large(carried * MIB, tracked * MIB)
    assert (problem is None) == (word is None)
    assert word is None or (
        word in str(problem) and f"{carried if carried > 60 else carried + tracked}.0 MiB" in str(problem)
    )


def test_the_repository_leaves_room_for_the_wheels() -> None:
    files = files_of(ROOT)
    assert Path(__file__) in files
    assert not any(file.is_relative_to(ROOT / "build") for file in files)
    assert size_of(files) < TREE_LIMIT - 20 * MIB
