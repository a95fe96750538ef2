"""The peers: plain LoRA by maximum likelihood and LoRA with dropout that stays on, both with Hugging Face's PEFT.

They get what ScalaBL's runs get: rows, order, steps, rank, targets, schedule, and the adapter of the best validation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from benchmarks.results.study import ALPHA, RANK, Study
from scalabl.model.attachment import Host
from scalabl.model.forward_pass import ForwardPass, RowSamples, enter
from scalabl.model.head import ChoiceHead, cut_head
from scalabl.model.token_batch import TokenBatch
from scalabl.model.trunk import Trunk
from scalabl.passes.batches import batches
from scalabl.training.recipe import TrainingConfig
from scalabl.training.trainer import LengthGroupedSampler

BATCH_TOKENS = 4096


@dataclass
class Lora:
    """A base model with PEFT's LoRA on the study's modules, its head cut to the choices."""

    study: Study
    model: PeftModel
    head: ChoiceHead
    trunk: Trunk

    def logits(self, name: str, rows: list[int], num_samples: int = 1) -> Tensor:
        """[B, K, C] of rows of a set; samples differ only by dropout, where it is on."""
        encoded = self.study.sets[name]
        ids, lengths = TokenBatch.of([encoded.sequences[i] for i in rows]).right_padded()
        inputs = torch.arange(len(rows)).repeat_interleave(num_samples)
        nothing_drawn = RowSamples(torch.empty(1, 0), torch.zeros_like(inputs), num_samples, inputs)
        states = self.study.caches[name].of(torch.tensor(rows), ids.shape[1])
        with enter(ForwardPass(ids, lengths, nothing_drawn, states=states)), self.trunk.skipped():
            output = self.model(input_ids=ids, use_cache=False)
        logits: Tensor = output.logits[:, 0]
        return logits.unflatten(0, (len(rows), num_samples))

    @torch.no_grad()
    def logits_of(self, name: str, num_samples: int = 1, *, dropout: bool = False, seed: int = 0) -> Tensor:
        """[N, K, C] of a whole set."""
        torch.manual_seed(seed)
        self.model.train(dropout)  # nothing but LoRA's dropout differs in training mode
        encoded = self.study.sets[name]
        logits = torch.empty(len(encoded.answers), num_samples, self.head.inner.out_features)
        for batch in batches([len(ids) for ids in encoded.sequences], num_samples, BATCH_TOKENS):
            logits[batch] = self.logits(name, batch, num_samples)
        self.model.eval()
        return logits


@contextmanager
def lora(study: Study, dropout: float, seed: int) -> Iterator[Lora]:
    """A fresh LoRA in the study's base model, which is as before afterwards."""
    _ = study.caches  # made by a model of their own, which must not come between
    base = study.pretrained.model
    host = Host.of(base)
    layers = study.config.layers_to_transform or ()
    targets = [name for name in study.config.target_modules if name != "lm_head"]
    names = [
        name
        for name in host.modules
        if name.rpartition(".")[2] in targets and any(f".layers.{layer}." in name for layer in layers)
    ]
    trunk = Trunk(host, names)
    head = ChoiceHead(cut_head(host.head, study.config.task.choice_tokens))
    base.lm_head = head
    torch.manual_seed(seed)
    targets = [*names, *(["lm_head.inner"] if "lm_head" in study.config.target_modules else [])]
    config = LoraConfig(r=RANK, lora_alpha=int(ALPHA), target_modules=targets, lora_dropout=dropout)
    peft = get_peft_model(base, config)
    trunk.attach()
    try:
        yield Lora(study, peft, head, trunk)
    finally:
        trunk.detach()
        peft.unload()
        base.lm_head = host.head


def fit(peer: Lora, rows: str, recipe: TrainingConfig) -> None:
    """Maximum likelihood by AdamW with ScalaBL's schedule; ends at the weights of the lowest validation NLL."""
    study, encoded = peer.study, peer.study.sets[rows]
    parameters = {name: p for name, p in peer.model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    warmup = round(recipe.warmup_fraction * recipe.max_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return step / max(1, warmup)
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, recipe.max_steps - warmup)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    best, best_weights = math.inf, {}
    order = _order(LengthGroupedSampler([len(ids) for ids in encoded.sequences], recipe.batch_size, recipe.seed))
    torch.manual_seed(recipe.seed)
    for step in range(1, recipe.max_steps + 1):
        peer.model.train()
        batch = [next(order) for _ in range(recipe.batch_size)]
        loss = nn.functional.cross_entropy(peer.logits(rows, batch)[:, 0], encoded.answers[batch])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters.values(), recipe.max_grad_norm)
        optimizer.step()
        schedule.step()
        if step % recipe.eval_steps == 0 or step == recipe.max_steps:
            state = torch.get_rng_state()
            logits = peer.logits_of("validation")[:, 0]
            torch.set_rng_state(state)
            nll = float(nn.functional.cross_entropy(logits, study.sets["validation"].answers))
            if nll < best:
                best, best_weights = nll, {name: p.detach().clone() for name, p in parameters.items()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(best_weights[name])
    peer.model.eval()


def _order(sampler: LengthGroupedSampler) -> Iterator[int]:
    epoch = 0
    while True:
        sampler.set_epoch(epoch)
        yield from sampler
        epoch += 1
