"""A real server under load: what it adds to the engine's time, what of the engine's throughput it delivers, and its latency.

python -m benchmarks.load --model <folder> [--only client,saturation,levels,soak] [--samples 8] [--output build/bench]

* `client`: one client, one request after the other: wall time at the client less the time of the pass. Each answer waits
  for the disk, so beside it what a bare fdatasync takes there, and the same client before a server that stores nothing.
* `saturation`: requests answered per second when all are sent at once, and in turns with it, in a process of its own, what
  the engine alone makes of the same prompts offline (sorted by length, joined up to the server's own budget).
* `levels`: Poisson arrivals at shares of that saturation, whatever becomes of those before: latency from when a request
  was due, answers in time per second, and 429s. A request's deadline is 20 times the median of one client.
* `soak`: the server's memory over 20,000 requests to a tiny random model, eight clients at a time.

The client shares the machine with the server, see `benchmarks.load.client`. On a machine that does nothing else.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.load.figure import load_figure
from benchmarks.load.measure import PARTS, add_arguments, measure_load
from benchmarks.parts import add_only, chosen_parts
from benchmarks.report import Report


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="base model: a folder (examples.intent_router.base_model)")
    parser.add_argument("--adapter", type=Path, help="a folder (default: the example's)")
    add_only(parser, PARTS)
    parser.add_argument("--output", type=Path, help="a folder for load.txt, load.json and figures")
    add_arguments(parser)
    options = parser.parse_args()
    parts = chosen_parts(parser, options.only, PARTS)
    report = Report("load", options.output)
    report.results["load"] = measure_load(options, report.line, parts)
    report.save()
    if options.output is not None:
        load_figure(report.results["load"]).savefig(options.output / "serving-load.png", dpi=120)


if __name__ == "__main__":
    main()
