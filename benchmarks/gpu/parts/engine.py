"""Passes of models in the shapes of real ones: seconds of an input beside the published loop and PEFT, and memory."""

from __future__ import annotations

import copy
import gc
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.gpu.parts.device_time import ceilings, waiting
from benchmarks.gpu.parts.shapes import pass_flops, ragged_prompts, random_llama, random_scalabl
from benchmarks.gpu.record import Bench
from benchmarks.serving.features import BEST, FEATURES, SwitchableModel, largest_difference
from benchmarks.serving.peers import Peers
from benchmarks.serving.trunk import FORMS
from benchmarks.timing import in_turns, ratio
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.model.token_batch import TokenBatch
from scalabl.passes.prefix_cache import PrefixCache, PrefixStore
from scalabl.passes.rounds import Rounds

# (tokens of the longest prompt, K), the most asked for first
CASES = ((512, 16), (64, 16), (64, 1), (512, 8), (64, 8), (512, 1), (64, 32), (512, 32))
DRY_CASES = ((6, 2),)
INPUTS, ROUNDS = {64: 4, 512: 2}, 3
ALIKE = 0.8  # of a prompt, where a prefix is shared
SAME = 1.0  # any difference of probabilities in bfloat16 but NaN: times are worth having, and the page shows the difference
PADDED, OURS, LOOP, PEFT = "one padded batch", "all features", "loop, as published", "PEFT, mixed batch"
MEMORY_LENGTH, MEMORY_ROWS = 64, 512  # of the largest pass whose memory is measured


def measure(bench: Bench) -> None:
    """Both shapes; of the larger one first what matters most."""
    bench.attempt("ceilings", lambda: bench.put("ceilings", ceilings(bench.device).as_json()))
    for name in ("7B",) if bench.dry else ("7B", "1B"):
        bench.attempt(f"{name}, all layers", lambda name=name: _all_layers(bench, name))
        _forget()
        bench.attempt(f"{name}, last third", lambda name=name: _last_third(bench, name))
        _forget()


def _forget() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _cases(bench: Bench) -> tuple[tuple[int, int], ...]:
    return DRY_CASES if bench.dry else CASES


def _all_layers(bench: Bench, name: str) -> None:
    base = random_llama(name, bench.device)
    untouched = copy.deepcopy(base)
    model = random_scalabl(base)
    ours = SwitchableModel(model)
    found = {"packs": model.packs, "trunk": model.trunk.verified, "trims": model.trunk.trims}
    bench.add("models", {"name": name, "adapted": len(model.adapted), **found})
    bench.attempt(f"{name}, memory", lambda: _memory(bench, name, model))
    bench.attempt(f"{name}, prefix cache", lambda: _prefix(bench, name, model))
    peers = Peers.of_model(model, untouched, max(count for _, count in _cases(bench)))
    for longest, count in bench.while_time(f"{name}, all layers", _cases(bench)):
        step = f"{name}, {longest} tokens, K = {count}"
        bench.attempt(step, partial(_methods, bench, name, base, ours, peers, longest, count))


def _methods(
    bench: Bench, name: str, base: PreTrainedModel, ours: SwitchableModel, peers: Peers, longest: int, count: int
) -> None:
    """Ours and the peers in turns: seconds of an input, share of the measured peak, and how far answers are apart."""
    prompts = ragged_prompts(longest, INPUTS.get(longest, 2), base.config.vocab_size)
    draws = ours.model.draws(count)
    passes: dict[str, Callable[[], Tensor]] = {
        PADDED: lambda: ours.run(prompts, draws, FEATURES["one padded batch"]),
        PEFT: lambda: peers.mixed_batch(prompts, count),
        LOOP: lambda: peers.loop(prompts, count),
        OURS: lambda: ours.run(prompts, draws, FEATURES[BEST]),
    }
    row: dict[str, Any] = {"model": name, "tokens": longest, "num_samples": count, "inputs": len(prompts)}
    difference = largest_difference(passes, same=SAME)
    peaks = {method: _peak(run) for method, run in passes.items()} if not bench.dry else {}
    seconds = in_turns({method: waiting(run, bench.device) for method, run in passes.items()}, ROUNDS)
    flops = pass_flops(base, list(map(len, prompts)), count)
    row |= {
        "largest_difference": difference,
        "peak_bytes": peaks,
        "seconds_per_input": {method: statistics.median(times) / len(prompts) for method, times in seconds.items()},
        "share_of_peak": {
            method: flops / statistics.median(times) / ceilings(bench.device).half for method, times in seconds.items()
        },
        "over_peft": ratio(seconds[PEFT], seconds[OURS]),
        "over_loop": ratio(seconds[LOOP], seconds[OURS]),
        "over_padded": ratio(seconds[PADDED], seconds[OURS]),
    }
    bench.add("methods", row)


def _peak(run: Callable[[], Tensor]) -> int:
    """Bytes that a pass allocates at most beyond what was allocated before."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def _last_third(bench: Bench, name: str) -> None:
    """An adapter on the last third of the blocks, with and without the shared trunk."""
    base = random_llama(name, bench.device)
    ours = SwitchableModel(random_scalabl(base, last_third=True))
    for longest, count in bench.while_time(f"{name}, last third", _cases(bench)[:3]):
        prompts = ragged_prompts(longest, INPUTS.get(longest, 2), base.config.vocab_size)
        draws = ours.model.draws(count)
        forms = FORMS | {OURS: FEATURES[BEST]}
        passes = {form: partial(ours.run, prompts, draws, features) for form, features in forms.items()}
        difference = largest_difference(passes, same=SAME)
        seconds = in_turns({form: waiting(run, bench.device) for form, run in passes.items()}, ROUNDS)
        row: dict[str, Any] = {"model": name, "tokens": longest, "num_samples": count, "largest_difference": difference}
        row["seconds_per_input"] = {form: statistics.median(times) / len(prompts) for form, times in seconds.items()}
        bench.add("trunk", row | {"ratio": ratio(seconds["without"], seconds["with"])})


def _prefix(bench: Bench, name: str, model: ScalaBLModel) -> None:
    """Prompts of which four fifths are alike, with and without the prefix cache."""
    vocabulary, generator = model.base.config.vocab_size, torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        drawn: list[int] = torch.randint(3, vocabulary, (count,), generator=generator).tolist()
        return drawn

    for longest, count in bench.while_time(f"{name}, prefix cache", _cases(bench)[:2]):
        alike = tokens(round(ALIKE * longest))
        cache = PrefixCache(PrefixStore(2**34), model, alike)
        draws, inputs = model.draws(count), INPUTS.get(longest, 2)
        seconds: dict[str, list[float]] = {"without": [], "with": []}
        difference = 0.0
        for _ in range(ROUNDS + 1):  # the first fills the cache
            prompts = {index: alike + tokens(longest - len(alike)) for index in range(inputs)}
            draws_of = dict.fromkeys(prompts, draws)
            answers = []
            for which, used in (("without", None), ("with", cache)):
                began = time.perf_counter()  # logits are on the CPU when they are there
                readings = Rounds(model, prompts, draws_of, used, keeps_trunk=False).readings(draws_of)
                answers.append({index: reading.logits for index, reading in readings.items()})
                seconds[which].append(time.perf_counter() - began)
            difference = max(
                difference, *(float((answers[0][i].softmax(-1) - answers[1][i].softmax(-1)).abs().max()) for i in prompts)
            )
        row: dict[str, Any] = {"model": name, "tokens": longest, "num_samples": count, "bytes": cache.store.bytes}
        row |= {"largest_difference": difference, "ratio": ratio(seconds["without"][1:], seconds["with"][1:])}
        bench.add("prefix", row | {"seconds_per_input": {w: statistics.median(s[1:]) / inputs for w, s in seconds.items()}})


def _memory(bench: Bench, name: str, model: ScalaBLModel) -> None:
    """What the server's budget predicts for a large pass from smaller ones, and what that pass takes."""
    from scalabl_server.engines.budget import measure_memory

    length, rows = (8, 16) if bench.dry else (MEMORY_LENGTH, MEMORY_ROWS)
    draws = model.draws(2 if bench.dry else 16)
    largest = rows * length

    def run(tokens: int) -> None:
        inputs = max(1, tokens // (draws.num_samples * length))
        model.logits(TokenBatch.of([[3] * length] * inputs), draws)

    _forget()
    points = measure_memory(run, _bytes_in_use, draws.num_samples * length, largest // 4, allowed=1e15)
    assert len(points) > 1, "one measured pass is too few to predict from"
    small, large = points[-2:]
    predicted = large.amount + (largest - large.tokens) * (large.amount - small.amount) / (large.tokens - small.tokens)
    run(largest)
    measured = _bytes_in_use()
    row = {"model": name, "tokens": largest, "predicted": predicted, "measured": measured}
    bench.add("memory", row | {"points": [[point.tokens, point.amount] for point in points]})


def _bytes_in_use() -> int:
    """As the server measures them on a GPU, the allocator's reserve included; on a CPU of this process."""
    if torch.cuda.is_initialized():
        free, total = torch.cuda.mem_get_info()
        return int(total - free)
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096
