"""Which of a task's choices an input has: the first ones (letters in multiple choice), or those that a request names.

Their logits are set to a very low value here; probabilities are computed in `predictive`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

OwnChoices = int | Sequence[int]  # the choices of one input: so many of the task's first ones, or those with these indices
ABSENT = -1e6  # the logit of a choice that an input does not have


def without_absent(logits: Tensor, num_choices: Tensor) -> Tensor:
    """Logits [N, K, C] with `ABSENT` for choices that an input does not have: their probability is 0 at usual temperatures.

    Args:
        num_choices: [N], the number of choices of each input; these are the first of the C choices.
    """
    absent = torch.arange(logits.shape[-1]) >= num_choices.unsqueeze(1)  # [N, C]
    return logits.masked_fill(absent.unsqueeze(1), ABSENT)


def columns_of(choices: OwnChoices) -> slice | list[int]:
    """The columns of an input's own choices in logits [..., C], in the input's order."""
    return slice(choices) if isinstance(choices, int) else list(choices)


def presence(choices: Sequence[OwnChoices], total: int) -> Tensor:
    """Which of `total` choices each of B inputs has, [B, C] bool."""
    mask = torch.zeros(len(choices), total, dtype=torch.bool)
    for row, own in enumerate(choices):
        mask[row, columns_of(own)] = True
    return mask
