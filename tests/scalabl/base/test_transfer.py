"""What the host prepares for a pass reaches the device as it was, in one buffer."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scalabl.base import transfer
from scalabl.base.transfer import ALIGNED, kept, moved

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def _elsewhere() -> Iterator[None]:
    """The CPU is taken for a device with a memory of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transfer, "on_host", lambda device: False)
        yield


@given(st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=6))
def test_tables_arrive_as_they_were(shapes: list[list[int]]) -> None:
    generator = torch.Generator().manual_seed(0)
    tables = [torch.randint(-(2**62), 2**62, tuple(shape), generator=generator) for shape in shapes]
    arrived = moved(tables, CPU)
    for table, there in zip(tables, arrived, strict=True):
        assert torch.equal(table, there)
        assert there.data_ptr() != table.data_ptr() or not table.numel()
        assert there.storage_offset() % ALIGNED == 0
        assert there.is_contiguous()
    assert len({there.untyped_storage().data_ptr() for there in arrived}) == 1


def test_a_tensor_is_brought_once_and_forgotten_with_the_original() -> None:
    there = torch.device("meta")
    tensor = torch.randn(3, 4)
    copy = kept(tensor, there)
    assert (copy.device, copy.shape) == (there, tensor.shape)
    assert kept(tensor, there) is copy
    assert kept(tensor.clone(), there) is not copy
    assert kept(copy, there) is copy
    before = len(transfer._copies)
    del tensor
    gc.collect()
    assert len(transfer._copies) == before - 1
