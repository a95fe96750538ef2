"""Where the time of one pass goes, kernel by kernel, so that the next change is chosen by it."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import profiler
from torch.autograd import DeviceType

from benchmarks.gpu.parts.device_time import waiting
from benchmarks.gpu.parts.shapes import ragged_prompts, random_llama, random_scalabl
from benchmarks.gpu.record import Bench
from scalabl.model.token_batch import TokenBatch

LONGEST, INPUTS, NUM_SAMPLES = 512, 2, 16
SMALL = (64, 1, 8)  # a pass of a lone request
SHOWN = 30  # rows of a table


def measure(bench: Bench) -> None:
    """A large and a small pass of the 7B with an adapter on all layers."""
    base = random_llama("7B", bench.device)
    model = random_scalabl(base)
    for longest, inputs, count in ((10, 1, 2),) if bench.dry else ((LONGEST, INPUTS, NUM_SAMPLES), SMALL):
        prompts = ragged_prompts(longest, inputs, base.config.vocab_size)
        draws = model.draws(count)
        run = waiting(lambda prompts=prompts, draws=draws: model.logits(TokenBatch.of(prompts), draws), bench.device)
        name = f"{inputs} prompts of up to {longest} tokens, K = {count}"
        bench.attempt(name, lambda name=name, run=run: bench.add("passes", {"name": name} | _profiled(run, bench.device)))


def _profiled(run: Any, device: str) -> dict[str, Any]:
    """Seconds of a pass, the share in which the device computed nothing, and the kernels that took longest."""
    for _ in range(2):
        run()
    began = time.perf_counter()
    run()
    seconds = time.perf_counter() - began
    activities = [profiler.ProfilerActivity.CPU]
    activities += [] if device == "cpu" else [profiler.ProfilerActivity.CUDA]
    with profiler.profile(activities=activities) as profiled:
        run()
    rows = []
    for event in profiled.key_averages():
        on_device = event.device_type == DeviceType.CUDA
        if on_device or device == "cpu":
            microseconds = event.self_device_time_total if on_device else event.self_cpu_time_total
            rows.append({"name": event.key[:120], "calls": event.count, "seconds": microseconds / 1e6})
    rows.sort(key=lambda row: -row["seconds"])
    busy = sum(row["seconds"] for row in rows)
    launches = sum(row["calls"] for row in rows)
    synchronisations = [e.count for e in profiled.key_averages() if "Synchronize" in e.key]
    table = profiled.key_averages().table(
        sort_by="self_cpu_time_total" if device == "cpu" else "self_device_time_total", row_limit=SHOWN
    )
    print(table, flush=True)
    return {
        "seconds": seconds,
        "busy_seconds": busy,
        "kernels": launches,
        "synchronisations": sum(synchronisations),
        "peak_bytes": int(torch.cuda.max_memory_allocated()) if device != "cpu" else 0,
        "rows": rows[:SHOWN],
    }
