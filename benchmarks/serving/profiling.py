"""Where the time of a pass with all features goes, operation by operation. Comparisons with other methods: `brute`."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import profiler

from benchmarks.report import Line
from benchmarks.serving.features import BEST, FEATURES, SwitchableModel
from benchmarks.serving.workload import inputs_of
from benchmarks.timing import in_turns
from scalabl.base.pretrained import load_pretrained
from scalabl.files.adapter_directory import load_adapter, read_config
from scalabl.prompt import Prompter

# What operations are for, in a decoder with rotary positions, root mean square norms and gated MLPs.
KINDS = {
    "matrix products": ("mm", "addmm", "addmm_", "bmm", "baddbmm", "linear", "matmul"),
    "attention": ("_scaled_dot_product_flash_attention_for_cpu", "_softmax", "scaled_dot_product_attention"),
    "activation": ("silu", "gelu", "relu", "sigmoid"),
    "product, sum, sign of each number": ("mul", "mul_", "add", "add_", "sub", "neg", "div", "div_", "addcmul_"),
    "norm": ("pow", "mean", "sum", "rsqrt"),
    "copy": ("copy_", "cat", "index", "index_select", "clone", "contiguous"),
}


def profile(options: argparse.Namespace, line: Line) -> list[dict[str, Any]]:
    """Each length with the largest number of samples: what a pass with all features spends its time on."""
    pretrained = load_pretrained(options.model)
    prompter = Prompter(read_config(options.adapter).task, pretrained.tokenizer)
    ours = SwitchableModel(load_adapter(pretrained.model, options.adapter))
    count = max(options.samples)
    draws, results = ours.model.draws(count), []
    for kind in options.prompts:
        run = partial(ours.run, inputs_of(prompter, kind, options.inputs), draws, FEATURES[BEST])
        run()
        result = {"prompts": kind, "num_samples": count, **profiled(run, options.rounds)}
        line(f"\n{kind} prompts, K = {count}: {result['seconds']:.2f} s a pass with all features, of which")
        for operations, share in sorted(result["shares"].items(), key=lambda item: -item[1]):
            line(f"{operations:<38}{share:>7.1%}")
        results.append(result)
    return results


def profiled(run: Callable[[], object], rounds: int) -> dict[str, Any]:
    """Seconds of `run` (median of so many), and each kind's share of the time of one run under the profiler."""
    seconds = in_turns({"run": run}, rounds)["run"]
    began = time.perf_counter()
    with profiler.profile(activities=[profiler.ProfilerActivity.CPU]) as profiled_run:
        run()
    seconds_profiled = time.perf_counter() - began
    operations = {row.key.removeprefix("aten::"): row.self_cpu_time_total / 1e6 for row in profiled_run.key_averages()}
    shares = {kind: sum(operations.pop(name, 0.0) for name in names) / seconds_profiled for kind, names in KINDS.items()}
    shares["other operations, and between them"] = 1 - sum(shares.values())
    return {"seconds": statistics.median(seconds), "seconds_profiled": seconds_profiled, "shares": shares}
