"""Masks the choices that an input does not have: a multiple-choice input may have fewer choices than the task has letters.

Their logits are set to a very low value here; probabilities are computed in `predictive`.
"""

from __future__ import annotations

import torch
from torch import Tensor

ABSENT = -1e6  # the logit of a choice that an input does not have


def without_absent(logits: Tensor, num_choices: Tensor) -> Tensor:
    """Logits [N, K, C] with `ABSENT` for choices that an input does not have: their probability is 0 at usual temperatures.

    Args:
        num_choices: [N], the number of choices of each input; these are the first of the C choices.
    """
    absent = torch.arange(logits.shape[-1]) >= num_choices.unsqueeze(1)  # [N, C]
    return logits.masked_fill(absent.unsqueeze(1), ABSENT)
