"""A server with the Triton kernel: it gives the logits of the plain computation, and requests need no new compilation."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from scalabl_kernels import launch, projection
from scalabl_kernels.reference import subspace_projection_torch

import scalabl.model.layer
from benchmarks.published import load_published
from scalabl.files.adapter_directory import load_adapter
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.model.token_batch import TokenBatch
from scalabl.passes.probes import find_shared_work
from scalabl.passes.side_by_side import SideBySide
from tests import tiny
from tests.server.conftest import serving, settings_for

fused = pytest.importorskip("scalabl_kernels.fused", reason="triton is not installed; it is for Linux")

pytestmark = [
    pytest.mark.fused,
    pytest.mark.skipif(not projection.FUSED_ON_CPU, reason="needs TRITON_INTERPRET=1"),
]

TEXTS = ["a", "how do i reset my card?", "is it red or green, and does it matter at all?", "b" * 40]


@contextmanager
def _counted(target: Any, name: str) -> Iterator[list[Any]]:
    """Every call of a function, by its result."""
    results: list[Any] = []
    real = getattr(target, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        results.append(result)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, call)
        yield results


@contextmanager
def _plain() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scalabl.model.layer, "subspace_projection", subspace_projection_torch)
        yield


def _both(model: ScalaBLModel, batch: TokenBatch, num_samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    draws = model.draws(num_samples)
    with _counted(fused, "subspace_projection_fused") as launches:
        with_kernel = model.logits(batch, draws)
        assert len(launches) == len(model.adapted)
        with _plain():
            without = model.logits(batch, draws)
        assert len(launches) == len(model.adapted), "the plain form launches nothing"
    return with_kernel, without


@pytest.mark.parametrize(
    ("name", "num_samples", "changes"),
    [
        *((name, num_samples, {}) for name in ("llama", "gpt2", "phi3") for num_samples in (1, 5)),
        ("llama", 4, tiny.MIXTURE),
        ("gpt2", 3, tiny.MIXTURE),
    ],
    ids=str,
)
def test_a_tiny_model_gives_the_plain_logits(name: str, num_samples: int, changes: dict[str, Any], tmp_path: Path) -> None:
    model = load_adapter(tiny.base_model(name), tiny.write_adapter(tmp_path / "adapter", name, **changes))
    with_kernel, without = _both(model, TokenBatch.of(tiny.ragged((3, 9, 1, 14))), num_samples)
    assert (with_kernel - without).abs().max() <= 1e-5


def test_adapters_side_by_side_give_the_plain_logits() -> None:
    base = tiny.base_model()
    models = [tiny.random_adapter(base, tiny.config_for(**changes), seed) for seed, changes in enumerate(({}, tiny.MIXTURE))]
    for model in models:
        find_shared_work(model)
    sequences, adapters = tiny.ragged((3, 9, 1)), [0, 1, 0]
    draws = [models[adapter].draws(4) for adapter in adapters]
    with _counted(fused, "subspace_projection_fused") as launches:
        with_kernel = SideBySide(models).readings(TokenBatch.of(sequences), draws, adapters)
        assert len(launches) == len(models[0].adapted) + 1, "once for a layer of the blocks, and once for each head"
    with _plain():
        without = SideBySide(models).readings(TokenBatch.of(sequences), draws, adapters)
        for ids, own, adapter, reading in zip(sequences, draws, adapters, with_kernel, strict=True):
            alone = models[adapter].logits(TokenBatch.of([ids]), own)[0]
            assert (reading.logits - alone).abs().max() <= 1e-5
    pairs = zip(with_kernel, without, strict=True)
    assert all((one.logits - other.logits).abs().max() <= 1e-5 for one, other in pairs)


def test_the_authors_checkpoint_gives_the_plain_logits_and_theirs(shared: Path, tmp_path: Path) -> None:
    published = load_published(shared, tmp_path / "adapter")
    with_kernel, without = _both(published.model, published.batch, 4)
    assert (with_kernel - without).abs().max() <= 1e-5
    assert (published.model.logits(published.batch, published.draws) - published.logits).abs().max() <= 1e-5


@pytest.fixture(scope="module")
def served(folders: Path) -> Iterator[tuple[TestClient, list[launch.LaunchShape]]]:
    """A ready server, and the launch shapes that its start went through."""
    with _counted(fused, "choose") as shapes, serving(settings_for(folders)) as client:
        yield client, shapes


def test_predict_answers_with_the_plain_probabilities(served: tuple[TestClient, Any]) -> None:
    client, _ = served
    body = {"inputs": TEXTS, "num_samples": 7, "return_samples": True}
    with_kernel = client.post("/predict", json=body).json()["predictions"]
    with _plain():
        without = client.post("/predict", json=body).json()["predictions"]
    for ours, theirs in zip(with_kernel, without, strict=True):
        for sample, plain in zip(ours["samples"], theirs["samples"], strict=True):
            assert sample == pytest.approx(plain, abs=1e-5)
        assert ours["mutual_information"] == pytest.approx(theirs["mutual_information"], abs=1e-5)


def test_warm_up_covers_every_launch_shape_that_traffic_meets(served: tuple[TestClient, list[launch.LaunchShape]]) -> None:
    client, shapes = served
    warm = set(shapes)
    chooser = random.Random(0)
    for num_samples in (1, 3, 24):
        texts = chooser.choices(TEXTS, k=chooser.choice([1, 3]))
        assert client.post("/predict", json={"inputs": texts, "num_samples": num_samples}).status_code == 200
    assert set(shapes) == warm
    assert len(warm) == len(launch.WARM_UP_ROWS)
