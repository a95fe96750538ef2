"""Within a pass the host never waits for the device, and what the host prepares goes there in few pinned copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.model.token_batch import TokenBatch
from scalabl.passes.prefix_cache import PrefixCache, PrefixStore
from scalabl.passes.probes import find_shared_work
from scalabl.passes.rounds import Rounds
from scalabl.passes.side_by_side import SideBySide
from tests import tiny

pytest.importorskip("triton", reason="triton is not installed; it is for Linux")
from tests.scalabl.model.simulated_gpu import DEVICE, SimulatedGpu, put_there, simulated_gpu

SEQUENCES = tiny.ragged((3, 9, 90, 14, 9, 90, 3))
COPIES = {"padded": 2, "packed": 3}  # of a pass: token ids and lengths, rows, tables of a packed pass


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that puts a model on the simulated GPU and runs something there."""

    def run(model: ScalaBLModel, work: Callable[[SimulatedGpu], object]) -> SimulatedGpu:
        with simulated_gpu(monkeypatch) as there, torch.inference_mode():
            put_there(model)
            assert model.device == DEVICE
            work(there)
        assert there.operators > 10
        return there

    return run


def ready(name: str, **changes: Any) -> ScalaBLModel:
    model = tiny.adapted(name, **changes)
    find_shared_work(model)
    return model


def lists(model: ScalaBLModel) -> Any:
    """Draws of seven inputs, of which some share theirs."""
    one, other = model.draws(3, seed=1), model.draws(5, seed=3)
    return [one, model.draws(1, seed=2), one, other, model.draws(1, seed=2), one, other]


@pytest.mark.parametrize(
    ("name", "form", "layers"),
    [
        ("llama", "padded", None),
        ("llama", "packed", None),
        ("llama", "packed", (1,)),
        ("gemma3", "packed", (1,)),  # a sliding window
        ("mistral", "padded", (1,)),
        ("gpt2", "padded", None),
    ],
)
def test_a_pass_waits_for_nothing(name: str, form: str, layers: tuple[int, ...] | None, gpu: Any) -> None:
    model = ready(name, layers_to_transform=layers)
    assert model.packs == (name != "gpt2")
    model.packs = form == "packed"
    batch, draws = TokenBatch.of(SEQUENCES), lists(model)

    def work(there: SimulatedGpu) -> None:
        for _ in range(2):
            logits = model.logits_each(batch, draws)
            assert [tensor.device for tensor in logits] == [DEVICE] * len(SEQUENCES)
        model.logits(batch, model.draws(4))

    there = gpu(model, work)
    assert there.waits == []
    assert len(there.copies) == 3 * COPIES[form] + 4  # of three passes, and of four different draws


def test_draws_are_brought_once(gpu: Any) -> None:
    model = ready("llama")
    batch, draws = TokenBatch.of(SEQUENCES), model.draws(16)

    def work(there: SimulatedGpu) -> None:
        model.logits(batch, draws)
        first = len(there.copies)
        model.logits(batch, draws)
        assert len(there.copies) == 2 * first - 1

    assert gpu(model, work).waits == []


@pytest.mark.parametrize("packs", [False, True], ids=["padded", "packed"])
def test_a_pass_that_adapters_share_waits_for_nothing(packs: bool, gpu: Any) -> None:
    base = tiny.base_model()
    one, other = (tiny.random_adapter(base, tiny.config_for(**changes), 0) for changes in ({}, tiny.MIXTURE))
    for model in (one, other):
        find_shared_work(model)
        model.packs = packs
    adapters = [0, 1, 1, 0, 1, 0, 0]
    draws = [(one, other)[adapter].draws(3) for adapter in adapters]

    def work(there: SimulatedGpu) -> None:
        for model in (one, other):
            model.attach()  # what is not attached is not among the modules
            put_there(model)
        readings = SideBySide((one, other)).readings(TokenBatch.of(SEQUENCES), draws, adapters)
        assert [tuple(reading.logits.shape) for reading in readings] == [(3, 3)] * len(SEQUENCES)

    assert gpu(one, work).waits == []


WAITS: dict[str, Callable[[torch.Tensor], object]] = {
    "a number": lambda x: x.sum().item(),
    "a branch": lambda x: bool(x[0, 0] > 0),
    "an integer": lambda x: int(x[0, 0]),
    "a copy to the host": lambda x: x.cpu(),
    "a list": lambda x: x.cpu().tolist(),
    "positions": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
    "distinct values": lambda x: torch.unique_consecutive(x[0]),
    "lengths as repeats": lambda x: torch.arange(4, device=x.device).repeat_interleave(x[0].long()),
    "a copy from ordinary memory": lambda x: torch.arange(4).to(x.device, non_blocking=True),
    "a copy that is waited for": lambda x: torch.arange(4).pin_memory().to(x.device),
    "an index on the host": lambda x: x[torch.tensor([0, 1])],
    "a list as an index": lambda x: x[[0, 1]],
}


@pytest.mark.parametrize("wait", WAITS)
def test_the_simulated_device_notices(wait: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated_gpu(monkeypatch) as there:
        x = torch.ones(4, 4, device=DEVICE)
        torch.arange(4).pin_memory().to(DEVICE, non_blocking=True)
        assert (there.waits, len(there.copies)) == ([], 1)
        try:
            WAITS[wait](x)
        except RuntimeError:  # a value or a size that is not known: a pass would end here
            return
        assert len(there.waits) == 1


@pytest.mark.parametrize("packs", [False, True], ids=["padded", "packed"])
def test_rounds_wait_for_the_answers_alone(packs: bool, gpu: Any) -> None:
    """Two rounds with the trunk's output kept, after a cached prefix: the host waits for the readings of each round only."""
    model = ready("llama", layers_to_transform=(1,))
    model.packs = packs
    opening = list(range(3, 3 + 40))
    prompts = {index: opening + sequence for index, sequence in enumerate(SEQUENCES)}
    draws = dict.fromkeys(prompts, model.draws(8))

    def work(there: SimulatedGpu) -> None:
        cache = PrefixCache.__new__(PrefixCache)
        cache.__dict__.update(built.__dict__)
        rounds = Rounds(model, prompts, draws, cache, keeps_trunk=True)
        rounds.readings(draws)
        rounds.readings({index: model.draws(8).part(4, 8) for index in (0, 2, 5)})

    built = PrefixCache(PrefixStore(2**30), model, opening)
    there = gpu(model, work)
    assert [wait for wait in there.waits if "to the host" not in wait] == []
    assert {wait.partition(" at ")[2].partition(":")[0] for wait in there.waits} == {"forward_pass.py"}, (
        "only where readings go to the host"
    )
