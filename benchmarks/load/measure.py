"""The parts of the load benchmark in their order, and the arguments that they take. How a part measures is in its module."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks.load.engine_alone import engine_alone
from benchmarks.load.levels import levels
from benchmarks.load.one_client import one_client
from benchmarks.load.saturation import saturation
from benchmarks.load.soak import soak
from benchmarks.load.workload import Workload, request_bodies
from benchmarks.processes.server import Server, serving
from benchmarks.report import Line

PARTS = ("client", "saturation", "levels", "soak")
PATIENCE = 20  # a deadline, in medians of one client


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What this benchmark can be told, beside model and output."""
    parser.add_argument("--load-samples", type=int, default=8, help="K of the load benchmark")
    parser.add_argument("--load-requests", type=int, default=200, help="of each level; a quarter of it at once or in turns")
    parser.add_argument("--levels", default="25,50,80,95,110", help="offered load, in percent of saturation")
    parser.add_argument("--soak", type=int, default=20_000, help="requests of the soak")
    parser.add_argument("--load-rounds", type=int, default=5, help="of saturation and offline, in turns")


def measure_load(options: argparse.Namespace, line: Line, parts: Sequence[str] = PARTS) -> dict[str, Any]:
    """All parts; the numbers behind what is printed."""
    results: dict[str, Any] = {"num_samples": options.load_samples, "requests": options.load_requests}
    workload = Workload(options.model, options.adapter, options.load_samples)
    bodies = request_bodies(options.load_requests)
    quarter = bodies[: max(1, len(bodies) // 4)]
    if set(parts) & {"client", "saturation", "levels"}:
        with tempfile.TemporaryDirectory() as scratch, serving(Path(scratch), **workload.settings) as server:
            budget = json.loads(server.get("/info"))["limits"]["target_batch_tokens"]
            line(
                f"\n{Path(options.model).name}, K = {options.load_samples}, prompts of one or two of the example's queries; "
                f"passes of up to {budget} tokens, as the server found"
            )
            results |= {"target_batch_tokens": budget, "client": one_client(server, quarter, line)}
            if {"saturation", "levels"} & set(parts):
                with engine_alone(workload, budget) if "saturation" in parts else nullcontext() as engine:
                    results["saturation"] = saturation(server, quarter, engine, options.load_rounds, line)
            if "levels" in parts:
                results["levels"] = _levels(options, server, bodies, results, line)
    if "client" in parts:
        settings = workload.settings | {"outcomes_url": "none", "target_batch_tokens": results["target_batch_tokens"]}
        with tempfile.TemporaryDirectory() as scratch, serving(Path(scratch), **settings) as server:
            results["client_storing_nothing"] = one_client(server, quarter, line)
    if "soak" in parts:
        results["soak"] = soak(options.soak, line)
    return results


def _levels(
    options: argparse.Namespace, server: Server, bodies: Sequence[dict[str, object]], results: dict[str, Any], line: Line
) -> list[dict[str, Any]]:
    """At shares of the saturation and with a deadline, both as measured just before."""
    deadline = PATIENCE * results["client"]["wall"]["median"]
    rate = results["saturation"]["server"]["median"]
    return levels(server, bodies, rate, [int(share) for share in options.levels.split(",")], deadline, line)
