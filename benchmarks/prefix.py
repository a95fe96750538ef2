"""Prompts of which four fifths are alike: with the prefix cache over without it. Called by `benchmarks.serving`."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scalabl.adapter_io import load_adapter
from scalabl.posterior import Draws
from scalabl.prefix_cache import PrefixCache, PrefixStore
from scalabl.pretrained import load_pretrained
from scalabl.rounds import Rounds

QUERIES = Path(__file__).resolve().parents[1] / "examples" / "intent_router" / "queries.txt"
ALIKE = 0.8
LIMIT = 2**29  # the server's default
TOKENS = {"short": 15, "medium": 70, "long": 300}


def prefix(options: argparse.Namespace, line: Callable[[str], None]) -> list[dict[str, Any]]:
    """Every length and K: batches of new prompts that go on from one beginning, run in turns with and without the cache."""
    pretrained = load_pretrained(options.model)
    model = load_adapter(pretrained.model, options.adapter)
    model.find_shared_work()
    words: list[int] = pretrained.tokenizer(QUERIES.read_text(encoding="utf-8"))["input_ids"]
    line(f"\n{ALIKE:.0%} of each prompt is what all begin with: prefix cache over the same without it")
    line(
        f"{'tokens':>6}{'K':>5}{'without, s / input':>20}{'with':>9}{'ratio':>22}{'probabilities within':>22}{'MB kept':>9}"
    )
    found = []
    for kind in options.prompts:
        for count in options.samples:
            store = PrefixStore(LIMIT)
            length = TOKENS[kind]
            cache = PrefixCache(store, model, words[: round(ALIKE * length)])
            seconds, apart = _in_turns(model, cache, words, length, model.draws(count), options)
            first, *rest = zip(seconds["without"], seconds["with"], strict=True)  # the first batch makes what others find
            ratios = [without / cached for without, cached in rest]
            row = {"prompts": kind, "num_samples": count, "tokens": length, "seconds": seconds, "bytes": store.bytes}
            row |= {"largest_difference": apart, "first_ratio": first[0] / first[1], "limit_bytes": LIMIT}
            row["ratio"] = {"median": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
            found.append(row)
            each = [statistics.median(seconds[name][1:]) / options.inputs for name in ("without", "with")]
            shown = f"{row['ratio']['median']:.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            cells = f"{length:>6}{count:>5}{each[0]:>20.3f}{each[1]:>9.3f}{shown:>20}"
            line(f"{cells}{apart:>22.0e}{store.bytes / 1e6:>9.0f}")
    return found


def _in_turns(
    model: Any, cache: PrefixCache, words: list[int], tokens: int, draws: Draws, options: argparse.Namespace
) -> tuple[dict[str, list[float]], float]:
    """Seconds of every batch, no two of the same prompts, and how far apart the two ways are in a sample's probabilities."""
    alike = round(ALIKE * tokens)
    seconds: dict[str, list[float]] = {"without": [], "with": []}
    apart = 0.0
    for batch in range(options.rounds + 1):
        starts = [alike + 3 * (batch * options.inputs + index) for index in range(options.inputs)]
        prompts = {start: words[:alike] + words[start : start + tokens - alike] for start in starts}
        logits = {}
        for name, kept in (("without", None), ("with", cache)):
            began = time.perf_counter()
            each = dict.fromkeys(prompts, draws)
            logits[name] = Rounds(model, prompts, each, kept, keeps_trunk=False).logits(each)
            seconds[name].append(time.perf_counter() - began)
        both = ((logits["without"][start].softmax(-1), logits["with"][start].softmax(-1)) for start in starts)
        apart = max(apart, *(float((one - other).abs().max()) for one, other in both))
    return seconds, apart
