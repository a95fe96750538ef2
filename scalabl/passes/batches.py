"""Splits sequences into batches of similar length within a token budget. The callers run the batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def batches(lengths: Sequence[int], num_samples: int, max_batch_tokens: int) -> Iterator[list[int]]:
    """Yields batches of indices with similar lengths, each with rows * longest <= max_batch_tokens or a single input.

    Args:
        lengths: number of tokens of each input.
        num_samples: number of rows of each input.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * num_samples * lengths[index] > max_batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
