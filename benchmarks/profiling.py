"""Where the time of a pass goes, operation by operation. Called by `benchmarks.serving`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile

# What operations are for, in a decoder with rotary positions, root mean square norms and gated MLPs.
KINDS = {
    "matrix products": ("mm", "addmm", "addmm_", "bmm", "baddbmm", "linear", "matmul"),
    "attention": ("_scaled_dot_product_flash_attention_for_cpu", "_softmax", "scaled_dot_product_attention"),
    "activation": ("silu", "gelu", "relu", "sigmoid"),
    "product, sum, sign of each number": ("mul", "mul_", "add", "add_", "sub", "neg", "div", "div_", "addcmul_"),
    "norm": ("pow", "mean", "sum", "rsqrt"),
    "copy": ("copy_", "cat", "index", "index_select", "clone", "contiguous"),
}


def profiled(run: Callable[[], object], rounds: int) -> dict[str, Any]:
    """Seconds of `run` (median of so many), and each kind's share of what a profiled one took."""
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    began = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    took = time.perf_counter() - began
    each = {row.key.removeprefix("aten::"): row.self_cpu_time_total / 1e6 for row in seen.key_averages()}
    shares = {kind: sum(each.pop(name, 0.0) for name in names) / took for kind, names in KINDS.items()}
    shares["other operations, and between them"] = 1 - sum(shares.values())
    return {"seconds": statistics.median(seconds), "seconds_profiled": took, "shares": shares}


def print_profile(found: dict[str, Any], line: Callable[[str], None]) -> None:
    """One line for each kind, the largest first."""
    what = f"{found['prompts']} prompts, K = {found['num_samples']}"
    line(f"\n{what}: {found['seconds']:.2f} s a pass with all features, of which")
    for kind, share in sorted(found["shares"].items(), key=lambda item: -item[1]):
        line(f"{kind:<38}{share:>7.1%}")
