"""K samples by what one would do otherwise and by ours, feature by feature: time, share of the matrix peak, memory.

python -m benchmarks.serving --model <folder> [--only brute,trunk,prefix,…] [--prompts medium] [--samples 10] [--rounds 5]

Every table is of one run in which the methods take turns; its ratios are of times within a round, and their median. All
methods are first seen to give the same probabilities. Runs on the device that `load_pretrained` chooses; made for a CPU.

Without --adapter it is a fresh one of rank 8 on every q_proj and v_proj and on the head: random, which time does not see.

* `brute`: the loop and PEFT beside one batch of all rows, and the same with each feature on top of the ones before it;
  with --vllm-python also K requests to a vLLM server beside this process. Last the base model in 8 bits, whose answers
  are not quite the same: by how much is printed.
* `profile`: where the time of a pass goes, with the largest number of samples.
* `trunk`: the adapter cut to the last third of the blocks, with and without the shared trunk.
* `prefix`: prompts of which 80% are alike, with and without the prefix cache.
* `memory`: what a pass takes beyond what the process holds, each in a process of its own.
* `load`: a real server under load (`benchmarks.load`).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.load.measure import add_arguments, measure_load
from benchmarks.parts import add_only, chosen_parts
from benchmarks.report import Report
from benchmarks.serving.brute import brute
from benchmarks.serving.figures import save_figures
from benchmarks.serving.memory import memory
from benchmarks.serving.prefix import prefix
from benchmarks.serving.profiling import profile
from benchmarks.serving.trunk import trunk
from benchmarks.serving.workload import LENGTHS, fresh_adapter

PARTS = {
    "brute": brute,
    "profile": profile,
    "trunk": trunk,
    "prefix": prefix,
    "memory": memory,
    "load": measure_load,
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="base model: a folder (examples.intent_router.base_model)")
    parser.add_argument("--adapter", type=Path, help="a folder (default: a fresh one)")
    add_only(parser, PARTS)
    parser.add_argument("--prompts", nargs="+", choices=LENGTHS, default=list(LENGTHS))
    parser.add_argument("--samples", nargs="+", type=int, default=[1, 8, 16, 32, 64])
    parser.add_argument("--inputs", type=int, default=4, help="of a batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-peers", action="store_true", help="leave out the loop and PEFT")
    parser.add_argument("--vllm-python", help="interpreter of an environment with vLLM, for K requests to it (see Makefile)")
    parser.add_argument("--output", type=Path, help="a folder for serving.txt and serving.json")
    add_arguments(parser)
    options = parser.parse_args()
    parts = chosen_parts(parser, options.only, PARTS)
    report = Report("serving", options.output)
    model = Path(options.model).name
    report.results |= {"model": model, "inputs": options.inputs, "rounds": options.rounds}
    report.line(f"{model}, {options.inputs} inputs a batch, {options.rounds} rounds in turns")
    with tempfile.TemporaryDirectory() as scratch:
        options.adapter = options.adapter or fresh_adapter(options.model, Path(scratch))
        for part, measure in PARTS.items():
            if part in parts:
                report.results[part] = measure(options, report.line)
    report.save()
    if options.output is not None:
        save_figures(report.results, options.output)


if __name__ == "__main__":
    main()
