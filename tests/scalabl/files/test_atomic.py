"""Files and folders that appear whole or not at all, whatever happens while they are written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from scalabl.files.atomic import new_folder, write_file


def test_a_file_replaces_the_old_one_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    for content in (b"old", b"new"):
        write_file(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == content
    assert os.listdir(tmp_path) == ["file"]


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(tmp_path / "file", b"old")

    def fail(self: Path, content: bytes) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="the disk is full"):
        write_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_appears_when_it_is_complete_and_its_parents_are_made(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    with new_folder(folder) as draft:
        (draft / "file").touch()
        assert not folder.exists()
    assert os.listdir(folder) == ["file"]
    assert os.listdir(folder.parent) == ["b"]


def test_a_folder_whose_writing_fails_never_appears(tmp_path: Path) -> None:
    def write() -> None:
        with new_folder(tmp_path / "folder") as draft:
            (draft / "file").touch()
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        write()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("keep_existing", [False, True])
def test_a_folder_that_another_process_made_meanwhile_stays(tmp_path: Path, keep_existing: bool) -> None:
    folder = tmp_path / "folder"

    def write() -> None:
        with new_folder(folder, keep_existing=keep_existing) as draft:
            (draft / "ours").touch()
            folder.mkdir()
            (folder / "theirs").touch()

    if keep_existing:
        write()
    else:
        with pytest.raises(OSError, match="folder"):
            write()
    assert os.listdir(folder) == ["theirs"]
    assert os.listdir(tmp_path) == ["folder"]


def test_others_may_read_what_was_written_as_far_as_the_umask_lets_them(tmp_path: Path) -> None:
    write_file(tmp_path / "file", b"")
    with new_folder(tmp_path / "folder"):
        pass
    (tmp_path / "plain file").touch()
    (tmp_path / "plain folder").mkdir()
    for kind in ("file", "folder"):
        assert (tmp_path / kind).stat().st_mode == (tmp_path / f"plain {kind}").stat().st_mode


def test_a_process_that_is_killed_leaves_no_folder(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, sys\n"
        "from scalabl.files.atomic import new_folder\n"
        "with new_folder(pathlib.Path(sys.argv[1])) as draft:\n"
        "    (draft / 'file').touch()\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "folder")], timeout=60)
    assert done.returncode == -9
    assert not (tmp_path / "folder").exists()
