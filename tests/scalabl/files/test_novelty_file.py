"""`novelty.safetensors`: what is written comes back, and a broken or mismatched reference is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from scalabl.errors import AdapterError
from scalabl.evaluation.novelty_fit import check_same_base
from scalabl.files.adapter_directory import fingerprint_of_files, load_adapter, read_config, save_config
from scalabl.files.novelty_file import read_novelty
from scalabl.files.output_folder import write_adapter
from tests import tiny

WIDTH = 32
FILE = "novelty.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.write_adapter(tmp_path_factory.mktemp("made") / "adapter")
    tiny.add_novelty(folder)
    return folder


@pytest.fixture
def adapter(made: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for file in made.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def edit(folder: Path, **changes: Tensor | None) -> None:
    """Change tensors; `None` removes one."""
    tensors = load_file(folder / FILE) | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / FILE)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    content = json.loads(path.read_text())
    content["novelty"] |= changes
    path.write_text(json.dumps(content))


def refused(folder: Path, message: str) -> None:
    with pytest.raises(AdapterError, match=message) as error:
        read_novelty(folder, read_config(folder), WIDTH)
    assert FILE in str(error.value)


def test_a_saved_reference_comes_back(tmp_path: Path) -> None:
    folder = tiny.write_adapter(tmp_path / "adapter")
    written = tiny.add_novelty(folder)
    read = read_novelty(folder, read_config(folder), WIDTH)
    assert read is not None
    states = torch.randn(20, WIDTH, generator=torch.Generator().manual_seed(0))
    assert torch.equal(read.scores(states), written.scores(states))
    one, other = read.p_values(read.scores(states)), written.p_values(written.scores(states))
    assert one is not None
    assert other is not None
    assert torch.equal(one, other)
    check_same_base(load_adapter(tiny.base_model(), folder), read)


def test_an_adapter_without_a_reference_is_written_as_version_1(tmp_path: Path) -> None:
    folder = tiny.write_adapter(tmp_path / "adapter")
    content = json.loads((folder / "adapter_config.json").read_text())
    assert content["format_version"] == 1
    assert "novelty" not in content
    assert read_novelty(folder, read_config(folder), WIDTH) is None


def test_a_reference_makes_it_version_2(adapter: Path) -> None:
    content = json.loads((adapter / "adapter_config.json").read_text())
    assert content["format_version"] == 2
    assert content["novelty"]["rows"] == 50
    assert content["novelty"]["calibration"]["level"] == 0.1
    content["format_version"] = 1
    (adapter / "adapter_config.json").write_text(json.dumps(content))
    with pytest.raises(AdapterError, match="novelty needs format_version 2"):
        read_config(adapter)


def test_another_temperature_keeps_the_reference(adapter: Path) -> None:
    config = read_config(adapter)
    save_config(adapter, config.model_copy(update={"temperature": 2.0, "posterior_scale": 0.5}))
    assert read_novelty(adapter, read_config(adapter), WIDTH) is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": None}, "tensor 'rows' is missing from"),
        ({"more": torch.ones(2)}, "tensor 'more' is not one that belongs into"),
        ({"mean": torch.zeros(31)}, r"tensor 'mean' of .* has shape \[31\]"),
        ({"projection": torch.zeros(30, 30)}, "tensor 'projection' of .* has shape"),
        ({"mean": torch.full((32,), torch.nan)}, "tensor 'mean' of .* has values that are not finite"),
        ({"probe": torch.full((32,), 2.0)}, "tensor 'probe' of .* not of unit length"),
        ({"calibration": torch.linspace(0, -1, 40, dtype=torch.float64)}, "tensor 'calibration' of .* ascending"),
        ({"calibration": torch.linspace(0, 9, 40, dtype=torch.float64)}, "tensor 'calibration' of .* from -1 to 1"),
        ({"calibration": torch.zeros(3, dtype=torch.float64)}, r"tensor 'calibration' of .* has shape \[3\]"),
        ({"calibration": None}, "tensor 'calibration' is missing from"),
    ],
    ids=str,
)
def test_broken_tensors_are_refused_by_name(adapter: Path, changes: dict[str, Tensor | None], message: str) -> None:
    components = read_config(adapter).novelty
    assert components is not None
    if "probe" in changes:
        changes = {"probe": torch.full((components.components,), 2.0)}
    edit(adapter, **changes)
    refused(adapter, message)


def test_rows_that_are_not_unit_vectors_are_refused(adapter: Path) -> None:
    edit(adapter, rows=load_file(adapter / FILE)["rows"] * 1.1)
    refused(adapter, "tensor 'rows' of .* not of unit length")


def test_a_missing_or_foreign_file_is_refused(adapter: Path) -> None:
    (adapter / FILE).write_bytes(b"something else")
    refused(adapter, "is not a safetensors file")
    (adapter / FILE).unlink()
    refused(adapter, "does not exist")


def test_another_base_model_or_width_or_other_weights_are_refused(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"novelty\.safetensors was made with .* have 32 numbers, .* have 64"):
        read_novelty(adapter, read_config(adapter), 64)
    edit_config(adapter, base_model_name_or_path="another")
    refused(adapter, "was made with the base model 'another', and adapter_config.json names 'tiny-llama'")
    edit_config(adapter, base_model_name_or_path="tiny-llama")
    other = tiny.write_adapter(tmp_path / "other", seed=4)
    (adapter / "adapter_model.safetensors").write_bytes((other / "adapter_model.safetensors").read_bytes())
    refused(adapter, r"was made with another adapter_model\.safetensors than the one beside it")


def test_a_base_model_of_the_same_width_with_other_weights_is_recognised(adapter: Path) -> None:
    reference = read_novelty(adapter, read_config(adapter), WIDTH)
    assert reference is not None
    with pytest.raises(AdapterError, match=r"novelty\.safetensors was made with another base model"):
        check_same_base(load_adapter(tiny.base_model(seed=3), adapter), reference)


def test_the_fingerprint_covers_it(adapter: Path) -> None:
    before = fingerprint_of_files(adapter)
    edit(adapter, mean=torch.zeros(WIDTH))
    assert fingerprint_of_files(adapter) != before


def test_a_new_adapter_in_its_place_has_no_old_reference(adapter: Path) -> None:
    model = tiny.adapted()
    write_adapter(adapter, model.config, dict(model.adapter_parameters()), overwrite=True)
    assert not (adapter / FILE).exists()
