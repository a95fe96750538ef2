"""Writing an adapter into a folder: refused where something else is, replaced as a whole, left alone when writing fails."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from torch import Tensor

from scalabl.config import AdapterConfig
from scalabl.errors import OutputError
from scalabl.files import output_folder
from scalabl.files.adapter_directory import load_adapter, read_config, read_weights
from scalabl.files.output_folder import check_unused, remove_adapter, write_adapter
from tests import tiny


def _adapter(**changes: object) -> tuple[AdapterConfig, dict[str, Tensor]]:
    model = tiny.adapted(**changes)  # type: ignore[arg-type]
    return model.config, dict(model.adapter_parameters())


def test_an_adapter_is_written_into_new_and_empty_folders(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "a/b"):
        write_adapter(tmp_path / name, *_adapter())
        assert sorted(os.listdir(tmp_path / name)) == ["adapter_config.json", "adapter_model.safetensors"]
        load_adapter(tiny.base_model(), tmp_path / name)


@pytest.mark.parametrize("name", ["adapter_config.json", "notes.txt", ".hidden"])
def test_a_folder_with_anything_in_it_is_refused_unless_it_may_be_overwritten(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(
        OutputError, match="is not empty; choose another --output, or add --overwrite to replace the adapter"
    ):
        write_adapter(tmp_path, *_adapter())
    assert os.listdir(tmp_path) == [name]
    write_adapter(tmp_path, *_adapter(), overwrite=True)
    assert (tmp_path / name).read_text() == "mine" or name == "adapter_config.json"
    load_adapter(tiny.base_model(), tmp_path)


def test_overwriting_removes_what_a_training_left(tmp_path: Path) -> None:
    for name in ("checkpoints/checkpoint-5/adapter_config.json", "checkpoints/mine", "training_run.json",
                 "runs/events.out.tfevents.1", "runs/mine"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("old")
    write_adapter(tmp_path, *_adapter(), overwrite=True)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["adapter_config.json", "adapter_model.safetensors", "checkpoints/mine", "runs/mine"]


def test_an_adapter_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_adapter(tmp_path, *_adapter(prior_std=0.5))
    old = (tmp_path / "adapter_model.safetensors").read_bytes()

    def full(folder: Path, *_: object) -> None:
        (folder / "adapter_model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output_folder, "save_adapter", full)
    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises(OutputError, match=f"{folder} cannot be written: No space left on device"):
            write_adapter(folder, *_adapter(), overwrite=True)
    assert read_config(tmp_path).prior_std == 0.5
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == old
    assert sorted(os.listdir(tmp_path)) == ["adapter_config.json", "adapter_model.safetensors"]


def test_a_process_killed_between_the_two_files_leaves_no_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the old configuration with the new weights."""
    write_adapter(tmp_path, *_adapter(prior_std=0.5))
    replace = os.replace

    def killed(source: Path, target: Path) -> None:
        replace(source, target)
        if target == tmp_path / "adapter_model.safetensors":
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_adapter(tmp_path, *_adapter(), overwrite=True)
    assert os.listdir(tmp_path) == ["adapter_model.safetensors"]
    assert read_weights(tmp_path)


def test_the_record_of_a_run_goes_before_its_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a half-removed checkpoint is never resumed."""
    (tmp_path / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "training_run.json").write_text("{}")

    def killed(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_adapter(tmp_path)
    assert os.listdir(tmp_path) == ["checkpoints"]


def test_a_path_below_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below" / "it"):
        with pytest.raises(OutputError, match=f"{tmp_path / 'file'} is not a folder; choose another --output"):
            check_unused(path, overwrite=True)
