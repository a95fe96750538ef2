"""Choices that an input does not have: in multiple choice some inputs offer fewer than the task has tokens for.

Their logits are put out of reach here; probabilities are computed in `predictive`.
"""

from __future__ import annotations

import torch
from torch import Tensor

ABSENT = -1e6  # the logit of a choice that an input does not have


def without_absent(logits: Tensor, num_choices: Tensor) -> Tensor:
    """[N, K, C], with the logits of choices that an input does not have put out of reach, at any usual temperature.

    Args:
        num_choices: [N], how many of the C choices each input has, counted from the first.
    """
    absent = torch.arange(logits.shape[-1]) >= num_choices.unsqueeze(1)  # [N, C]
    return logits.masked_fill(absent.unsqueeze(1), ABSENT)
