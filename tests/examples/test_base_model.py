"""The example's base model is taken from its folder only if it is all there, and the right one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from examples.intent_router import base_model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small stand-in for the fetched model."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in base_model.NEEDED:
        (folder / name).write_text("{}")
    save_file({"b": torch.arange(6.0), "a": torch.ones(2, 3)}, folder / base_model.WEIGHTS)
    monkeypatch.setattr(base_model, "WEIGHTS_SHA256", base_model.weights_sha256(folder / base_model.WEIGHTS))
    return folder


def test_the_model_that_was_fetched_is_taken(folder: Path) -> None:
    assert base_model.fetch(folder) == folder
    save_file({"b": torch.arange(6.0), "a": torch.ones(2, 3)}, folder / base_model.WEIGHTS, metadata={"by": "another"})
    assert base_model.fetch(folder) == folder


@pytest.mark.parametrize("name", [*base_model.NEEDED, base_model.WEIGHTS])
def test_a_folder_that_lacks_a_file_is_refused(name: str, folder: Path) -> None:
    (folder / name).unlink()
    with pytest.raises(RuntimeError, match=f"{folder} is not empty and lacks {name} of the model; name another folder"):
        base_model.fetch(folder)


def test_another_model_is_refused(folder: Path) -> None:
    save_file({"b": torch.arange(6.0), "a": torch.zeros(2, 3)}, folder / base_model.WEIGHTS)
    with pytest.raises(RuntimeError, match=f"{folder} holds another model: the SHA-256 of its weights is [0-9a-f]{{64}}"):
        base_model.fetch(folder)


@pytest.mark.parametrize("content", [b"", b"\x02\0\0\0\0\0\0\0[]", b"\xff" * 9, b"half"], ids=str)
def test_weights_that_are_no_safetensors_file_are_refused(content: bytes, folder: Path) -> None:
    (folder / base_model.WEIGHTS).write_bytes(content)
    with pytest.raises(RuntimeError, match=f"cannot be read as safetensors .*; remove {folder} to fetch the model again"):
        base_model.fetch(folder)


def test_weights_that_were_cut_are_refused(folder: Path) -> None:
    whole = (folder / base_model.WEIGHTS).read_bytes()
    (folder / base_model.WEIGHTS).write_bytes(whole[:-4])
    with pytest.raises(RuntimeError, match="the file is cut"):
        base_model.fetch(folder)


def test_the_command_says_it_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    command = [sys.executable, "-m", "examples.intent_router.base_model", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (
        f"error: {tmp_path} is not empty and lacks config.json of the model; name another folder, or remove it\n"
    )
