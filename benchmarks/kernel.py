"""What the adapter's projection costs on top of the base layer: fused kernel, plain form and PEFT's, interleaved.

python -m benchmarks.kernel [--dtype bf16] [--json out.json]

On a GPU the forms are timed by `triton.testing.do_bench` (medians, cold L2 cache), on a CPU by interleaved rounds; there
the Triton kernel cannot run and `fused` is its plain torch form. Every form adds the same numbers to the base output.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from scalabl_kernels import subspace_projection
from torch import Tensor

from benchmarks.machine import describe
from benchmarks.timing import in_turns, ratio

RANK, NUM_SAMPLES, SCALING = 8, 16, 2.0
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def forms(rows: int, d: int, device: torch.device, dtype: torch.dtype, rank: int = RANK) -> dict[str, Callable[[], Tensor]]:
    """The base layer's product alone and with each way of adding the adapter: a function each, M rows, K samples."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device) / shape[-1] ** 0.5).to(dtype)

    base, x, a, b = normal(d, d), normal(rows, d), normal(rank, d), normal(d, rank)
    s = normal(NUM_SAMPLES, rank).float()
    sample = torch.arange(rows, device=device) % NUM_SAMPLES
    a_of_sample = (a * s.to(dtype).unsqueeze(-1)).contiguous()  # [K, R, d]: PEFT has one LoRA per sample
    groups = [(sample == k).nonzero().squeeze(1) for k in range(NUM_SAMPLES)]
    linear = torch.nn.functional.linear

    def ours() -> Tensor:
        return subspace_projection(linear(x, base), x, a, b, s, sample, SCALING, inplace=True)

    def four_operations() -> Tensor:
        u = linear(x, a) * s.to(dtype)[sample]
        return linear(x, base) + SCALING * linear(u, b)

    def peft() -> Tensor:  # as LoraLayer's mixed batches do: each adapter's rows, taken out and added back
        y = linear(x, base)
        for k, own in enumerate(groups):
            y[own] += linear(linear(x[own], a_of_sample[k]), b) * SCALING
        return y

    expected = four_operations().float()
    for name, form in (("ours", ours), ("peft", peft)):
        error = (form().float() - expected).abs().max() / expected.abs().max()
        assert error <= (1e-5 if dtype == torch.float32 else 2e-2), f"{name} differs by {error}"
    return {"base": lambda: linear(x, base), "ours": ours, "four operations": four_operations, "peft": peft}


def time_forms(functions: dict[str, Callable[[], Tensor]], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of each form in each round, the forms taking turns."""
    if device.type == "cuda":
        from triton.testing import do_bench

        seconds: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(rounds):
            for name, function in functions.items():
                seconds[name].append(do_bench(function, return_mode="median") / 1e3)
        return seconds
    for function in functions.values():  # warm
        function()
    return in_turns(functions, rounds)


@torch.inference_mode()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="(default: bf16 on a GPU, fp32 on a CPU)")
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256, 512, 1024, 2048])
    parser.add_argument("--widths", type=int, nargs="+", help="d_in = d_out (default: 576 2048; on a GPU 2048 4096)")
    parser.add_argument("--rounds", type=int, help="(default: 101 on a CPU, 5 medians on a GPU)")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    device = torch.device(options.device)
    gpu = device.type == "cuda"
    dtype = options.dtype or ("bf16" if gpu else "fp32")
    print(describe(), f"{torch.get_num_threads()} threads", sep=", ")
    form = "Triton kernel" if gpu else "plain torch form"
    print(
        f"rank {RANK}, K = {NUM_SAMPLES}, {dtype}; `fused` is the {form}; median of the per-round time over the base layer's"
    )
    print(f"{'rows':>6}{'d':>6}{'base us':>10}" + "".join(f"{name:>18}" for name in ("fused", "four operations", "peft")))
    results = []
    for d in options.widths or ([2048, 4096] if gpu else [576, 2048]):
        for rows in options.rows:
            functions = forms(rows, d, device, DTYPES[dtype])
            seconds = time_forms(functions, device, options.rounds or (5 if gpu else 101))
            base = statistics.median(seconds["base"])
            overhead = {
                name: ratio(taken, seconds["base"])["median"] - 1 for name, taken in seconds.items() if name != "base"
            }
            cells = "".join(f"{share:>+18.1%}" for share in overhead.values())
            print(f"{rows:>6}{d:>6}{base * 1e6:>10.0f}{cells}", flush=True)
            results.append({"rows": rows, "d": d, "base_seconds": base, "overhead": overhead})
    if options.json:
        report = {"machine": describe(), "dtype": dtype, "rank": RANK, "num_samples": NUM_SAMPLES, "results": results}
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
