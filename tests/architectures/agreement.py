"""Whether an adapter on a base model gives what plain passes of merged copies of that base model give."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from scalabl.base.targets import ALL_LINEAR, targets_of
from scalabl.config import AdapterConfig, Task
from scalabl.errors import AdapterError
from scalabl.model.past import Past
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.model.token_batch import TokenBatch
from scalabl.passes.prefix import longest_exact
from scalabl.passes.probes import find_shared_work
from tests import tiny

TASK = Task(kind="classification", template="{input}", choices=("a", "b", "c"), choice_tokens=(5, 17, 40))
SAMPLES = 3
LENGTHS = (3, 11, 7, 24)
PREFIX = 6  # tokens that the inputs of the pass with a stored prefix have in common
TOLERANCE = 2e-4  # of the largest logit


@dataclass(frozen=True)
class Agreement:
    """What was compared with the merged copies.

    Attributes:
        ways: the ways to compute an answer that were compared.
        error: the largest difference of a logit, as a share of the largest logit.
        left_out: modules that cannot be adapted, with the reason that the refusal gave.
    """

    ways: tuple[str, ...]
    error: float
    left_out: dict[str, str]


def agreement_of(base: PreTrainedModel) -> Agreement:
    """Adapt all linear layers and the head of a base model, and compare it with its merged copies.

    Raises:
        AdapterError, BaseModelError: the base model is refused; the message names what is wrong.
    """
    plain = copy.deepcopy(base)
    model, left_out = _adapted(base)
    draws = model.draws(SAMPLES, seed=1)
    vocabulary = base.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(3, vocabulary, (n,), generator=generator).tolist() for n in LENGTHS]
    merged = [_merged(plain, model, s) for s in model.sample(draws.epsilon)]
    expected = _plain_logits(merged, sequences)

    found = {"alone": torch.cat([model.logits(TokenBatch.of([ids]), draws) for ids in sequences])}
    if model.packs:
        found["packed"] = model.logits(TokenBatch.of(sequences), draws)
    model.packs = False
    found["masked" if model.masks else "padded"] = model.logits(TokenBatch.of(sequences), draws)
    scale = float(expected.abs().max())
    errors = [float((logits - expected).abs().max()) / scale for logits in found.values()]
    if longest_exact(model) >= max(LENGTHS) + PREFIX:
        common = sequences[-1][:PREFIX]
        prefix = model.prefix(common, draws)
        logits = model.logits_each(
            TokenBatch.of(sequences), [draws] * len(sequences), past=Past({draws.key: [prefix]}, PREFIX)
        )
        found["prefix"] = torch.stack(logits)
        after = _plain_logits(merged, [common + ids for ids in sequences])
        errors.append(float((found["prefix"] - after).abs().max()) / scale)
    return Agreement(tuple(found), max(errors), left_out)


def _adapted(base: PreTrainedModel) -> tuple[ScalaBLModel, dict[str, str]]:
    """The base model with a random adapter on every linear layer that can be adapted."""
    head = base.get_output_embeddings()
    names = dict(base.named_modules())
    head_name = [name for name, module in names.items() if module is head]
    linear = targets_of(base, ALL_LINEAR)
    targets = [*(name for name in names if _is_target(name, linear)), *head_name]
    left_out: dict[str, str] = {}
    while True:
        config = AdapterConfig(base_model_name_or_path="tiny", r=2, lora_alpha=4.0, target_modules=tuple(targets), task=TASK)
        model = ScalaBLModel(base, config)
        tiny.fill(model)
        model.requires_grad_(False).eval()
        try:
            find_shared_work(model)
        except AdapterError as error:
            named = re.match("'([^']+)' of the base model", str(error))
            model.detach()
            if named is None or named[1] in head_name:
                raise
            kind = named[1].rpartition(".")[2]
            left_out[kind] = str(error)
            targets = [name for name in targets if name.rpartition(".")[2] != kind or name in head_name]
        else:
            return model, left_out


def _is_target(name: str, targets: tuple[str, ...]) -> bool:
    return any(name == target or name.endswith("." + target) for target in targets)


def _merged(plain: PreTrainedModel, model: ScalaBLModel, s: Tensor) -> PreTrainedModel:
    """A copy of the base model whose weights are W0 + scaling * B diag(s) A."""
    merged = copy.deepcopy(plain)
    head = merged.get_output_embeddings()
    for name, layer in model.adapted.items():
        module = merged.get_submodule(name)
        delta = layer.delta_weight(s[layer._columns])
        weight = module.weight.detach().clone()
        if module is head:
            weight[list(TASK.choice_tokens or ())] += delta
        else:
            weight += delta.T if isinstance(module, Conv1D) else delta
        module.weight = nn.Parameter(weight, requires_grad=False)  # of its own: the head may share the embeddings'
    return merged


def _plain_logits(merged: list[PreTrainedModel], sequences: list[list[int]]) -> Tensor:
    """[B, K, C]: each input alone, without padding, through transformers only."""
    with torch.inference_mode():
        rows = [
            copy_k(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1, list(TASK.choice_tokens or ())]
            for ids in sequences
            for copy_k in merged
        ]
    return torch.stack(rows).view(len(sequences), len(merged), -1)
