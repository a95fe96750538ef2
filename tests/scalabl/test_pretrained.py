"""Loading a base model: what is allowed, and what is said when it cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scalabl.errors import BaseModelError
from scalabl.pretrained import load_pretrained, resolve_device, resolve_dtype
from tests import tiny


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return tiny.write_base(tmp_path / "base")


def test_a_folder_loads_frozen_in_eval_mode_with_its_limit(base: Path) -> None:
    pretrained = load_pretrained(str(base), device="cpu")
    assert pretrained.max_tokens == 512
    assert not pretrained.model.training
    assert not any(parameter.requires_grad for parameter in pretrained.model.parameters())
    assert pretrained.model.dtype == torch.float32
    assert load_pretrained(str(base), device="cpu", dtype="bfloat16").model.dtype == torch.bfloat16


def test_pickled_weights_are_refused(base: Path) -> None:
    (base / "model.safetensors").unlink()
    torch.save(tiny.base_model().state_dict(), base / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match=r"cannot be loaded: .*safetensors"):
        load_pretrained(str(base), device="cpu")


def test_a_name_that_leads_nowhere_is_named() -> None:
    with pytest.raises(
        BaseModelError, match="'nobody/nothing' cannot be loaded; it is not a folder here, so it was looked up"
    ):
        load_pretrained("nobody/nothing", device="cpu")


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match=f"the base model {str(tmp_path)!r} cannot be loaded: "):
        load_pretrained(str(tmp_path), device="cpu")


def test_a_device_that_is_not_there_is_named() -> None:
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(BaseModelError, match="device 'abacus' cannot be used"):
        resolve_device("abacus")
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
