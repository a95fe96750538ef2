"""A base model in lower precision: how it is loaded, what is said when it cannot be, and what it changes."""

from __future__ import annotations

import json
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from scalabl.base import pretrained as loading
from scalabl.base.pretrained import Pretrained, load_pretrained
from scalabl.config import Quantization
from scalabl.errors import BaseModelError, DatasetError
from scalabl.evaluation.precision_change import QUERIES, Probes, QuantizationChange, load_and_ask
from scalabl.files.adapter_directory import load_adapter
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.passes.probes import find_shared_work
from scalabl.prompt import Prompter
from scalabl.uncertainty.predictive import Predictive
from tests import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.write_base(tmp_path / "base")
    tiny.write_adapter(tmp_path / "colours")
    tiny.write_adapter(tmp_path / "letters", task=tiny.MULTIPLE_CHOICE)
    return tmp_path


def _ask(model: ScalaBLModel, pretrained: Pretrained, file: Path | None = None) -> Predictive:
    prompter = Prompter(model.config.task, pretrained.tokenizer)
    return Probes(file).ask(model, prompter, pretrained.max_tokens, model.draws(4))


def test_every_adapter_answers_before_and_after(folder: Path) -> None:
    adapters = {name: folder / name for name in ("colours", "letters")}
    load = partial(load_pretrained, str(folder / "base"), device="cpu")
    pretrained, before = load_and_ask(lambda each: load(quantization=each), "int8", adapters, _ask)
    untouched = load()
    for name, path in adapters.items():
        expected = _ask(load_adapter(untouched.model, path), untouched)
        assert torch.equal(before[name].probabilities, expected.probabilities)
        change = QuantizationChange.between(before[name], _ask(load_adapter(pretrained.model, path), pretrained))
        assert (change.inputs, change.num_samples) == (len(QUERIES), 4)
        assert 0 < change.probability_mean < change.probability_largest < 0.2
        assert 0 < change.mutual_information_mean < change.mutual_information_largest < 0.2


def test_the_change_is_what_it_says(folder: Path) -> None:
    pretrained = load_pretrained(str(folder / "base"), device="cpu")
    found = _ask(load_adapter(pretrained.model, folder / "colours"), pretrained)
    assert QuantizationChange.between(found, found).model_dump(exclude={"inputs", "num_samples"}) == {
        "probability_largest": 0, "probability_mean": 0, "mutual_information_largest": 0, "mutual_information_mean": 0,
        "other_decisions": 0,
    }  # fmt: skip
    p, mi = found.probabilities.clone(), found.mutual_information.clone()
    p[2] = p[2].roll(1)
    mi[5] -= 0.25
    other = Predictive(p, found.entropy, found.expected_entropy, mi, found.sample_probabilities, found.standard_error)
    change = QuantizationChange.between(found, other)
    moved = float((p[2] - found.probabilities[2]).abs().max())
    assert change.probability_largest == pytest.approx(moved)
    assert change.probability_mean == pytest.approx(moved / len(QUERIES))
    assert change.mutual_information_largest == pytest.approx(0.25)
    assert change.mutual_information_mean == pytest.approx(0.25 / len(QUERIES))
    assert change.other_decisions == 1
    assert f"at most {moved:.2g} " in str(change)


def test_inputs_of_ones_own_are_asked(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "probes.jsonl"
    rows = [{"text": f"question {n}", "choices": ["one", "two", "three"], "answer": -1} for n in range(3)]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    pretrained = load_pretrained(str(folder / "base"), device="cpu")
    found = _ask(load_adapter(pretrained.model, folder / "letters"), pretrained, file)
    assert found.probabilities.shape == (3, 4)
    assert (found.probabilities[:, 3] < 1e-9).all(), "a choice that no row has"
    with pytest.raises(DatasetError, match="cannot be read"):
        Probes(tmp_path / "absent.jsonl")


@pytest.mark.parametrize("quantization", ["bnb-8bit", "bnb-4bit"])
def test_bitsandbytes_loads_and_answers(tmp_path: Path, quantization: Quantization) -> None:
    wide = {"hidden_size": 128, "intermediate_size": 192}  # its blocks of 64 weights; narrower rows go wrong on a CPU
    config = type(tiny.ARCHITECTURES["llama"][0])(**tiny.SMALL | wide)
    base = type(tiny.base_model())(config).requires_grad_(False).eval()
    for parameter in base.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.08)
    base.save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)  # of its own imports
        pretrained = load_pretrained(str(tmp_path / "base"), device="cpu", quantization=quantization)
    layer = pretrained.model.model.layers[0].mlp.up_proj
    assert not layer.weight.is_floating_point()
    assert type(pretrained.model.lm_head) is nn.Linear
    model = ScalaBLModel(pretrained.model, tiny.config_for())
    tiny.fill(model)
    find_shared_work(model.eval())
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    model.detach()
    found, expected = pretrained.model(ids).logits, base(ids).logits
    assert 0 < float((found - expected).norm() / expected.norm()) <= 0.3
    assert torch.isfinite(_ask(model, pretrained).probabilities).all()


def test_a_missing_package_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: None if name == "bitsandbytes" else name)
    with pytest.raises(BaseModelError, match=r"needs the package bitsandbytes; install it with: pip install 'scalabl\["):
        load_pretrained(str(folder / "base"), device="cpu", quantization="bnb-8bit")


def test_what_does_not_fit_as_it_is_is_served_without_a_comparison(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    def load(quantization: Quantization | None) -> Pretrained:
        if quantization is None:
            raise torch.OutOfMemoryError("the whole model")
        return load_pretrained(str(folder / "base"), device="cpu", quantization=quantization)

    pretrained, before = load_and_ask(load, "int8", {"colours": folder / "colours"}, _ask)
    assert before == {}
    assert torch.isfinite(_ask(load_adapter(pretrained.model, folder / "colours"), pretrained).probabilities).all()
    assert "the change of answers is not measured" in caplog.text
