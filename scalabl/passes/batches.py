"""Which sequences run together: batches of similar length within a token budget. Running them is done elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def batches(lengths: Sequence[int], num_samples: int, max_batch_tokens: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, each within rows * longest <= max_batch_tokens (at least one input).

    Args:
        lengths: tokens of each input.
        num_samples: rows that each input takes.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batch and (len(batch) + 1) * num_samples * lengths[index] > max_batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
