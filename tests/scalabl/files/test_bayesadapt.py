"""The authors' checkpoint, converted, answers as their own code did; and what the converter refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.published import Published, load_published
from scalabl.config import Task
from scalabl.errors import AdapterError
from scalabl.files.adapter_directory import read_weights
from scalabl.files.bayesadapt import convert_bayesadapt
from scalabl.model.token_batch import TokenBatch

LETTERS = Task(kind="multiple_choice", template="{input}\n{choices}\nAnswer:", choices=("A", "B"), choice_tokens=(4, 5))


@pytest.fixture(scope="module")
def published(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Published:
    return load_published(shared, tmp_path_factory.mktemp("converted"))


def test_every_sample_of_the_authors_checkpoint_is_reproduced_in_one_pass(published: Published) -> None:
    logits = published.model.logits(published.batch, published.draws)
    assert logits.shape == published.logits.shape
    assert (logits - published.logits).abs().max() <= 1e-5


def test_the_mean_of_the_authors_checkpoint_is_reproduced(published: Published) -> None:
    logits = published.model.logits(published.batch, published.model.mean_draw())
    assert (logits[:, 0] - published.mean_logits).abs().max() <= 1e-5


def test_the_agreement_holds_for_each_input_alone_and_unpadded(published: Published) -> None:
    ids, lengths = published.batch.right_padded()
    for row, length in enumerate(lengths.tolist()):
        alone = published.model.logits(TokenBatch.of([ids[row, :length].tolist()]), published.draws)
        assert (alone[0] - published.logits[row]).abs().max() <= 1e-5


def _state(layers: int = 2, rank: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for module in [*(f"model.layers.{i}.self_attn.q_proj" for i in range(layers)), "lm_head"]:
        prefix = f"base_model.model.{module}"
        state |= {
            f"{prefix}.lora_A.default.log_s": torch.randn(rank, generator=generator),
            f"{prefix}.lora_A.default.Vh": torch.randn(rank, 8, generator=generator),
            f"{prefix}.lora_A.default.log_s_sigma": torch.randn(rank, generator=generator),
            f"{prefix}.lora_A.default.log_p_mu": torch.zeros(rank),
            f"{prefix}.lora_A.default.log_p_sigma": torch.full((rank,), 0.5),
            f"{prefix}.lora_B.default.weight": torch.randn(2 if module == "lm_head" else 8, rank, generator=generator),
        }
    return state


def _convert(state: object, folder: Path) -> Path:
    torch.save(state, folder / "state_dict.pt")
    convert_bayesadapt(folder / "state_dict.pt", folder / "out", base_model="tiny", lora_alpha=6.0, task=LETTERS)
    return folder / "out"


def test_the_written_directory_has_our_names_and_their_values(tmp_path: Path) -> None:
    state = _state()
    out = _convert(state, tmp_path)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj", "lm_head"]
    assert (config["r"], config["lora_alpha"], config["layers_to_transform"]) == (3, 6.0, None)
    assert config["prior_std"] == pytest.approx(torch.tensor(0.5).exp().item())
    weights = read_weights(out)
    theirs = "base_model.model.model.layers.1.self_attn.q_proj"
    ours = "model.layers.1.self_attn.q_proj"
    assert torch.equal(weights[f"{ours}.s_mean"], state[f"{theirs}.lora_A.default.log_s"].exp())
    assert torch.equal(weights[f"{ours}.lora_A"], state[f"{theirs}.lora_A.default.Vh"])


def test_layers_that_were_left_out_are_recorded(tmp_path: Path) -> None:
    state = {key: value for key, value in _state(layers=3).items() if ".layers.1." not in key}
    config = json.loads((_convert(state, tmp_path) / "adapter_config.json").read_text())
    assert config["layers_to_transform"] == [0, 2]


class _Dangerous:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("unpickled",)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"weight": torch.ones(1)}, "has no key like base_model.model.<module>.lora_A.default.log_s; it is not"),
        ([torch.ones(1)], "contains a list, not a state dict"),
        (
            {k: v for k, v in _state().items() if "lm_head.lora_A.default.Vh" not in k},
            r"lm_head has no tensor lora_A\.default\.Vh",
        ),
        ({**_state(), **{k: v[:2] for k, v in _state(rank=3).items() if "lm_head.lora_A.default.log_s" in k}}, "ranks"),
    ],
)
def test_a_file_that_is_no_such_checkpoint_is_refused(state: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=message):
        _convert(state, tmp_path)


def test_nothing_is_unpickled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AdapterError, match="is not a PyTorch state dict of tensors"):
        _convert({"weight": _Dangerous()}, tmp_path)
    assert "unpickled" not in capsys.readouterr().out


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"absent\.pt does not exist"):
        convert_bayesadapt(tmp_path / "absent.pt", tmp_path / "out", base_model="tiny", lora_alpha=1.0, task=LETTERS)
    (tmp_path / "empty.pt").touch()
    with pytest.raises(AdapterError, match="is not a PyTorch state dict"):
        convert_bayesadapt(tmp_path / "empty.pt", tmp_path / "out", base_model="tiny", lora_alpha=1.0, task=LETTERS)
