"""The peers of the benchmarks compute what ScalaBL does: PEFT with one LoRA for each sample."""

from __future__ import annotations

import copy

import torch

from benchmarks.random_model import COLOURS, LLAMA, adapter_config, random_adapter, random_base
from benchmarks.serving.peers import Peers
from scalabl.model.token_batch import TokenBatch


def test_samples_as_loras_give_the_same_logits() -> None:
    base = random_base(LLAMA)
    untouched = copy.deepcopy(base)
    model = random_adapter(base, adapter_config("tiny-llama", ("q_proj", "v_proj"), COLOURS))
    peers = Peers.of_model(model, untouched, 3)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    expected = model.logits(TokenBatch.of(prompts), model.draws(3))
    for logits in (peers.loop(prompts, 3), peers.loop(prompts, 3, last_only=True), peers.mixed_batch(prompts, 3)):
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
