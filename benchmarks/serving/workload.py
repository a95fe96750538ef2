"""What the methods are measured on: prompts of given lengths, and an adapter on every block. The methods are elsewhere."""

from __future__ import annotations

import bisect
from pathlib import Path

import torch

from benchmarks import example
from scalabl.base.pretrained import load_pretrained
from scalabl.files.adapter_directory import read_config, save_adapter
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.prompt import Prompter

LENGTHS = {"short": (10, 20), "medium": (50, 90), "long": (220, 380)}  # tokens of the shortest and the longest input


def fresh_adapter(model: str, folder: Path) -> Path:
    """An adapter on every block, for the example's task, whose samples differ."""
    config = read_config(example.ADAPTER).model_copy(
        update={"target_modules": ("q_proj", "v_proj", "lm_head"), "layers_to_transform": None}
    )
    adapted = ScalaBLModel(load_pretrained(model).model, config)
    adapted.reset_adapter(0, std_init=0.3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in adapted.adapted.values():
            layer.lora_B.normal_(0, 0.02, generator=generator)
    save_adapter(folder, config, adapted.adapter_parameters())
    return folder


def inputs_of(prompter: Prompter, kind: str, count: int) -> list[list[int]]:
    """`count` prompts of ragged lengths, made of the example's queries."""
    queries = example.queries()
    shortest, longest = LENGTHS[kind]
    prompts = []
    for index in range(count):
        most_tokens = shortest + (longest - shortest) * index // max(1, count - 1)
        words = " ".join(queries[index % len(queries) :] + queries).split() * 4

        def encoded(num_words: int, words: list[str] = words) -> list[int]:
            return prompter.encode(" ".join(words[:num_words]))

        fitting = bisect.bisect_right(range(1, len(words) + 1), most_tokens, key=lambda number: len(encoded(number)))
        prompts.append(encoded(max(1, fitting)))
    return prompts
