"""Batches cover every input once and stay within their budget of tokens."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from scalabl.passes.batches import batches


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 9), st.integers(1, 600))
def test_batches_cover_every_input_once_within_the_budget(lengths: list[int], samples: int, budget: int) -> None:
    planned = list(batches(lengths, samples, budget))
    assert sorted(index for batch in planned for index in batch) == list(range(len(lengths)))
    for batch in planned:
        assert len(batch) == 1 or len(batch) * samples * max(lengths[i] for i in batch) <= budget
