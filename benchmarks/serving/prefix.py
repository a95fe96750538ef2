"""Prompts of which four fifths are alike: with the prefix cache over without it. Other shortcuts: `brute` and `trunk`."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from benchmarks.report import Line
from benchmarks.timing import ratio, ratio_text
from scalabl.base.pretrained import load_pretrained
from scalabl.files.adapter_directory import load_adapter
from scalabl.passes.prefix_cache import PrefixCache, PrefixStore
from scalabl.passes.probes import find_shared_work
from scalabl.passes.rounds import Rounds

ALIKE = 0.8
LIMIT = 2**29  # the server's default
TOKENS = {"short": 15, "medium": 70, "long": 300}


def prefix(options: argparse.Namespace, line: Line) -> list[dict[str, Any]]:
    """Every length and K: batches of new, random prompts after one beginning, run in turns with and without the cache."""
    pretrained = load_pretrained(options.model)
    model = load_adapter(pretrained.model, options.adapter)
    find_shared_work(model)
    generator, vocabulary = torch.Generator().manual_seed(0), len(pretrained.tokenizer)
    line(f"\n{ALIKE:.0%} of each prompt is what the template begins with: prefix cache over the same without it")
    line(f"{'tokens':>6}{'K':>5}{'without, s / input':>20}{'with':>9}{'ratio':>20}{'probabilities within':>22}{'MB':>9}")
    rows = []
    for kind in options.prompts:
        for count in options.samples:
            alike = _tokens(round(ALIKE * TOKENS[kind]), vocabulary, generator)
            cache = PrefixCache(PrefixStore(LIMIT), model, alike)
            seconds: dict[str, list[float]] = {"without": [], "with": []}
            difference, draws = 0.0, model.draws(count)
            for _ in range(options.rounds + 1):  # the first batch fills the cache
                rests = [_tokens(TOKENS[kind] - len(alike), vocabulary, generator) for _ in range(options.inputs)]
                prompts = {index: alike + rest for index, rest in enumerate(rests)}
                draws_of, probabilities = dict.fromkeys(prompts, draws), []
                for name, used in (("without", None), ("with", cache)):
                    began = time.perf_counter()
                    readings = Rounds(model, prompts, draws_of, used, keeps_trunk=False).readings(draws_of)
                    seconds[name].append(time.perf_counter() - began)
                    probabilities.append({index: readings[index].logits.softmax(-1) for index in prompts})
                one, other = probabilities
                difference = max(difference, *(float((one[index] - other[index]).abs().max()) for index in prompts))
            row: dict[str, Any] = {"prompts": kind, "num_samples": count, "tokens": TOKENS[kind], "bytes": cache.store.bytes}
            row["ratio"] = ratio(seconds["without"][1:], seconds["with"][1:])
            rows.append(row | {"limit_bytes": LIMIT, "largest_difference": difference, "seconds": seconds})
            times = [statistics.median(seconds[name][1:]) / options.inputs for name in seconds]
            cells = f"{TOKENS[kind]:>6}{count:>5}{times[0]:>20.3f}{times[1]:>9.3f}{ratio_text(row['ratio']):>20}"
            line(f"{cells}{difference:>22.0e}{cache.store.bytes / 1e6:>9.0f}")
    return rows


def _tokens(count: int, vocabulary: int, generator: torch.Generator) -> list[int]:
    tokens: list[int] = torch.randint(vocabulary, (count,), generator=generator).tolist()
    return tokens
