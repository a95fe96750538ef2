"""Combined adapters: the members in order, without calibration; what differs is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from scalabl_server.cli.main import app
from typer.testing import CliRunner, Result

from scalabl.files.adapter_directory import load_adapter, read_config, read_weights, save_adapter
from scalabl.model.token_batch import TokenBatch
from tests import tiny


def _combine(adapters: Sequence[Path], output: Path, *more: str) -> Result:
    return CliRunner().invoke(app, ["combine", *map(str, adapters), "--output", str(output), *more])


def _write(folder: Path, seed: int, **changes: Any) -> Path:
    model = tiny.adapted(seed=seed, **changes)
    save_adapter(folder, model.config, dict(model.adapter_parameters()))
    return folder


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    return [_write(tmp_path / name, seed) for seed, name in enumerate("abc")]


def test_the_members_of_a_combination_are_the_adapters(adapters: list[Path], tmp_path: Path) -> None:
    result = _combine(adapters, tmp_path / "all")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"wrote {tmp_path / 'all'}: a mixture of 3 members\n"
    model, batch = load_adapter(tiny.base_model(), tmp_path / "all"), TokenBatch.of(tiny.ragged())
    draws = model.draws(6, seed=4)
    logits = model.logits(batch, draws)
    for member, folder in enumerate(adapters):
        alone = load_adapter(tiny.base_model(), folder)
        expected = alone.logits(batch, alone.draws(2, seed=4 + member))
        assert (logits[:, member::3] - expected).abs().max() <= 1e-5


def test_a_mixture_can_be_combined_further(adapters: list[Path], tmp_path: Path) -> None:
    assert _combine(adapters[:2], tmp_path / "two").exit_code == 0
    assert _combine([adapters[2], tmp_path / "two"], tmp_path / "three").exit_code == 0
    assert _combine([adapters[2], *adapters[:2]], tmp_path / "expected").exit_code == 0
    found, expected = (read_weights(tmp_path / name) for name in ("three", "expected"))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert read_config(tmp_path / "three") == read_config(tmp_path / "expected")


def test_calibration_and_novelty_are_left_out_and_the_command_says_so(tmp_path: Path) -> None:
    adapters = [_write(tmp_path / "a", 0, temperature=1.5), _write(tmp_path / "b", 1, prior_std=4.0)]
    tiny.add_novelty(adapters[0])
    result = _combine(adapters, tmp_path / "all")
    assert f"calibration and novelty of {adapters[0]} do not hold for the mixture and were left out" in result.stderr
    config = read_config(tmp_path / "all")
    assert (config.temperature, config.posterior_scale, config.calibration, config.novelty) == (1.0, 1.0, None, None)
    assert not (tmp_path / "all" / "novelty.safetensors").exists()
    assert config.prior_std == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 2}, "its r is 2 and that of the other is 4"),
        ({"lora_alpha": 4.0}, "its lora_alpha is 4.0 and that of the other is 8.0"),
        (
            {"base_model_name_or_path": "other"},
            'its base_model_name_or_path is "other" and that of the other is "tiny-llama"',
        ),
        ({"target_modules": ("q_proj", "lm_head")}, 'its target_modules is ["lm_head", "q_proj"] and that of the other'),
        ({"layers_to_transform": (1,)}, "its layers_to_transform is [1] and that of the other is null"),
        ({"task": tiny.CLASSIFICATION.model_copy(update={"template": "{input}\nColour:"})}, "its task.template is"),
    ],
)
def test_what_differs_is_named(adapters: list[Path], tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    model = tiny.adapted()
    if "task" in changes:
        changes = {"task": model.config.task.model_copy(update={"template": changes["task"].template})}
        save_adapter(tmp_path / "other", model.config.model_copy(update=changes), dict(model.adapter_parameters()))
    else:
        _write(tmp_path / "other", 3, **changes)
    result = _combine([*adapters, tmp_path / "other"], tmp_path / "all")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: {tmp_path / 'other'} cannot be combined with {adapters[0]}: {message}")
    assert not (tmp_path / "all").exists()


def test_tensors_that_differ_are_named(adapters: list[Path], tmp_path: Path) -> None:
    weights = read_weights(adapters[1])
    config = read_config(adapters[1])
    save_adapter(tmp_path / "short", config, {n: t for n, t in weights.items() if not n.startswith("lm_head.s_mean")})
    result = _combine([adapters[0], tmp_path / "short"], tmp_path / "all")
    assert "tensor 'lm_head.s_mean' is missing from" in result.stderr
    save_adapter(tmp_path / "narrow", config, weights | {"lm_head.s_mean": torch.ones(2)})
    result = _combine([adapters[0], tmp_path / "narrow"], tmp_path / "all")
    assert "tensor 'lm_head.s_mean' of" in result.stderr
    assert "has shape [2]; that of" in result.stderr


def test_folders_that_make_no_sense_are_refused(adapters: list[Path], tmp_path: Path) -> None:
    before = json.loads((adapters[0] / "adapter_config.json").read_text())
    assert "at least two adapters" in _combine(adapters[:1], tmp_path / "all").stderr
    assert "is given twice" in _combine([adapters[0], tmp_path / "." / "a"], tmp_path / "all").stderr
    assert "is one of the adapters to combine" in _combine(adapters, adapters[0], "--overwrite").stderr
    shutil.copytree(adapters[0], tmp_path / "used")
    assert "is not empty; choose another --output" in _combine(adapters, tmp_path / "used").stderr
    assert _combine(adapters, tmp_path / "used", "--overwrite").exit_code == 0
    assert read_config(tmp_path / "used").members == 3
    assert json.loads((adapters[0] / "adapter_config.json").read_text()) == before
