"""A real server under load: what it adds to the engine's time, what of the engine's throughput it delivers, and its latency.

python -m benchmarks.load --model <folder> [--only client,saturation,levels,soak] [--samples 8] [--output build/bench]

* `client`: one client, one request after the other: wall time at the client less the time of the pass. Each answer waits
  for the disk, so beside it what a bare fdatasync takes there, and the same client before a server that stores nothing.
* `saturation`: requests answered per second when all are sent at once, and in turns with it, in a process of its own, what
  the engine alone makes of the same prompts offline (sorted by length, joined up to the server's own budget).
* `levels`: Poisson arrivals at shares of that saturation, whatever becomes of those before: latency from when a request
  was due, answers in time per second, and 429s. A request's deadline is 20 times the median of one client.
* `soak`: the server's memory over 20,000 requests to the tests' tiny model, eight clients at a time.

The client shares the machine with the server, see `benchmarks.client`. On a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.client import Answer, Client, Server, serving
from benchmarks.figures import save_figures
from benchmarks.machine import describe

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "intent_router"
PARTS = ("client", "saturation", "levels", "soak")
PATIENCE = 20  # a deadline, in medians of one client
SOAK_CLIENTS, SETTLING = 8, 1000  # requests after which memory is compared with

Line = Callable[[str], None]


def arguments(parser: argparse.ArgumentParser) -> None:
    """What this benchmark can be told, beside model and output."""
    parser.add_argument("--load-samples", type=int, default=8, help="K of the load benchmark")
    parser.add_argument("--load-requests", type=int, default=200, help="of each level; a quarter of it at once or in turns")
    parser.add_argument("--levels", default="25,50,80,95,110", help="offered load, in percent of saturation")
    parser.add_argument("--soak", type=int, default=20_000, help="requests of the soak")
    parser.add_argument("--load-rounds", type=int, default=5, help="of saturation and offline, in turns")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="base model: a folder (examples.intent_router.base_model)")
    parser.add_argument("--adapter", type=Path, help="a folder (default: the example's)")
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated parts (default: all)")
    parser.add_argument("--output", type=Path, help="a folder for load.txt, load.json and figures")
    parser.add_argument("--offline", type=int, help=argparse.SUPPRESS)  # a process that runs the engine: its budget
    arguments(parser)
    options = parser.parse_args()
    parts = options.only.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"--only: {unknown[0]!r} is none of {', '.join(PARTS)}")
    if options.offline:
        _offline(options)
        return
    lines: list[str] = []

    def line(text: str) -> None:
        print(text, flush=True)
        lines.append(text)

    line(f"{describe()}, {torch.get_num_threads()} threads; load average at the start {os.getloadavg()[0]:.1f}")
    results = {"machine": describe(), "load_at_start": os.getloadavg()[0], "load": load(options, line, parts)}
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "load.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (options.output / "load.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        save_figures(results, options.output)


def load(options: argparse.Namespace, line: Line, parts: Sequence[str] = PARTS) -> dict[str, Any]:
    """All parts; the numbers behind what is printed."""
    found: dict[str, Any] = {"num_samples": options.load_samples, "requests": options.load_requests}
    if set(parts) & {"client", "saturation", "levels"}:
        with tempfile.TemporaryDirectory() as scratch, serving(Path(scratch), **_settings(options)) as server:
            found |= _on_the_model(options, server, line, parts)
    if "client" in parts:
        settings = _settings(options) | {"outcomes_url": "none", "target_batch_tokens": found["target_batch_tokens"]}
        with tempfile.TemporaryDirectory() as scratch, serving(Path(scratch), **settings) as server:
            bodies = _bodies(options)
            found["client_storing_nothing"] = one_client(server, bodies[: _quarter(bodies)], line)
    if "soak" in parts:
        found["soak"] = soak(options.soak, line)
    return found


def _settings(options: argparse.Namespace) -> dict[str, object]:
    return {
        "model": options.model,
        "adapter": options.adapter or EXAMPLE / "adapter",
        "num_samples": options.load_samples,
        "max_queue": 100_000,
        "request_timeout": 600,
        "prefix_cache_bytes": 0,  # the prompts come again, those of real traffic do not
    }


def _on_the_model(options: argparse.Namespace, server: Server, line: Line, parts: Sequence[str]) -> dict[str, Any]:
    budget = json.loads(server.get("/info"))["limits"]["target_batch_tokens"]
    line(
        f"\n{Path(options.model).name}, K = {options.load_samples}, prompts of one or two of the example's queries; "
        f"passes of up to {budget} tokens, as the server found"
    )
    found: dict[str, Any] = {"target_batch_tokens": budget}
    bodies = _bodies(options)
    quarter = _quarter(bodies)
    found["client"] = one_client(server, bodies[:quarter], line)
    if {"saturation", "levels"} & set(parts):
        with engine(options, budget) if "saturation" in parts else _nobody() as offline:
            found["saturation"] = saturation(server, bodies[:quarter], offline, options.load_rounds, line)
    if "levels" in parts:
        deadline = PATIENCE * found["client"]["wall"]["median"]
        rate = found["saturation"]["server"]["median"]
        shares = [int(share) for share in options.levels.split(",")]
        found["levels"] = levels(server, bodies, rate, shares, deadline, line)
    return found


def _bodies(options: argparse.Namespace) -> list[dict[str, object]]:
    return [{"inputs": text} for text in texts(options.load_requests)]


def _quarter(bodies: Sequence[object]) -> int:
    return max(1, len(bodies) // 4)


def texts(count: int) -> list[str]:
    """One or two of the example's queries each, the same every time."""
    queries = (EXAMPLE / "queries.txt").read_text(encoding="utf-8").splitlines()
    chance = random.Random(0)
    return [" and ".join(chance.sample(queries, chance.choice((1, 1, 2)))) for _ in range(count)]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 95% and 99%, and the ends."""
    ordered = sorted(values)
    at = {f"p{share}": ordered[min(len(ordered) - 1, math.ceil(share / 100 * len(ordered)) - 1)] for share in (95, 99)}
    return {"median": statistics.median(ordered), **at, "lowest": ordered[0], "highest": ordered[-1]}


def one_client(server: Server, bodies: Sequence[dict[str, object]], line: Line) -> dict[str, Any]:
    """Wall times of one client, and beside each what the pass took by the server's log."""
    client = Client(server.port, bodies)
    known, warm = len(server.requests()), min(3, len(bodies))
    asyncio.run(client.one_by_one(range(warm)))  # the first ones meet cold caches
    commits = _commits(server)
    answers = asyncio.run(client.one_by_one(range(len(bodies))))
    committing, count = (after - earlier for after, earlier in zip(_commits(server), commits, strict=True))
    _expect(answers, {200})
    deadline = time.monotonic() + 10  # a line may come after its answer
    while len(logged := server.requests()[known + warm :]) < len(answers) and time.monotonic() < deadline:
        time.sleep(0.05)
    rows = list(zip(answers, logged, strict=True))  # one after the other, so the order is the same
    stages = ("tokenization_seconds", "queue_seconds", "inference_seconds")
    inference = [float(str(row["inference_seconds"])) for _, row in rows]
    added = [answer.seconds - seconds for (answer, _), seconds in zip(rows, inference, strict=True)]
    inside = [float(str(row["seconds"])) - seconds for (_, row), seconds in zip(rows, inference, strict=True)]
    found = {
        "wall": spread([answer.seconds for answer, _ in rows]),
        "added": spread(added),
        "added_inside": spread(inside),
        "commit_mean": committing / count if count else None,
        "bare_sync": spread(bare_syncs(server.log.parent)) if count else None,
        "stages": {name: spread([float(str(row[name])) for _, row in rows]) for name in stages},
    }
    median = {name: 1000 * found["stages"][name]["median"] for name in stages}
    storing = "the server stores nothing"
    if count:
        storing = (
            f"storing the prediction {1000 * found['commit_mean']:.2f} (mean; a bare fdatasync there takes "
            f"{1000 * found['bare_sync']['median']:.2f})"
        )
    line(
        f"one client, {len(rows)} requests: {1000 * found['wall']['median']:.1f} ms (median), of which the pass "
        f"{median['inference_seconds']:.1f}; the server adds {1000 * found['added']['median']:.2f} ms (95%: "
        f"{1000 * found['added']['p95']:.2f}): {1000 * found['added_inside']['median']:.2f} of them by its own clock, among "
        f"them tokenising {median['tokenization_seconds']:.2f} and the way to the model's thread "
        f"{median['queue_seconds']:.2f}; {storing}; the rest is sockets, parsing and the client"
    )
    return found


def bare_syncs(folder: Path, count: int = 40) -> list[float]:
    """Seconds of an fdatasync after a write of one page, at odd times: a disk may answer at even ones."""
    chance, seconds = random.Random(0), list[float]()
    with tempfile.TemporaryFile(dir=folder) as file:
        for number in range(count):
            time.sleep(chance.uniform(0.02, 0.04))
            began = time.perf_counter()
            os.pwrite(file.fileno(), os.urandom(4096), 4096 * number)
            os.fdatasync(file.fileno())
            seconds.append(time.perf_counter() - began)
    return seconds


def _commits(server: Server) -> tuple[float, float]:
    """(seconds, number) of commits to the outcomes database, which every answer waits for."""
    name = "scalabl_outcomes_commit_duration_seconds"
    values = dict(line.rsplit(" ", 1) for line in server.get("/metrics").decode().splitlines())
    return float(values[f"{name}_sum"]), float(values[f"{name}_count"])


def saturation(
    server: Server,
    bodies: Sequence[dict[str, object]],
    offline: Callable[[Sequence[str]], float] | None,
    rounds: int,
    line: Line,
) -> dict[str, Any]:
    """Requests per second when all come at once, and in turns what the engine alone makes of the same prompts."""
    prompts = [str(body["inputs"]) for body in bodies]
    served, alone = list[float](), list[float]()
    for _ in range(rounds):
        if offline is not None:
            alone.append(len(prompts) / offline(prompts))
        answers = asyncio.run(Client(server.port, bodies).at_once(len(bodies)))
        _expect(answers, {200})
        served.append(len(answers) / (max(a.ended for a in answers) - min(a.sent for a in answers)))
    found: dict[str, Any] = {"server": spread(served), "server_rounds": served}
    text = f"saturation: {found['server']['median']:.2f} requests per second ({min(served):.2f} to {max(served):.2f})"
    if offline is not None:
        each = [one / other for one, other in zip(served, alone, strict=True)]
        found |= {"engine": spread(alone), "engine_rounds": alone, "share_of_engine": spread(each)}
        text += (
            f", the engine alone {found['engine']['median']:.2f}: {statistics.median(each):.1%} of it "
            f"({min(each):.1%} to {max(each):.1%}, {rounds} rounds in turns)"
        )
    line(text)
    return found


def levels(
    server: Server,
    bodies: Sequence[dict[str, object]],
    rate: float,
    shares: Sequence[int],
    deadline: float,
    line: Line,
) -> list[dict[str, Any]]:
    """Latency at each share of the rate; the same arrivals each time, nearer together."""
    line(
        f"\nPoisson arrivals, {len(bodies)} requests a level, deadline {deadline:.1f} s; ms from when a request was due, "
        "answered ones only"
    )
    line(f"{'load':>5}{'offered / s':>13}{'p50':>9}{'p95':>9}{'p99':>9}{'p99 / p50':>11}{'in time / s':>13}   statuses")
    found = []
    for share in shares:
        chance, at, after = random.Random(1), 0.0, []
        for _ in bodies:
            at += chance.expovariate(rate * share / 100)
            after.append(at)
        client = Client(server.port, bodies, x_request_timeout=f"{deadline:.3f}")
        answers = asyncio.run(client.open_loop(after))
        _expect(answers, {200, 429, 504})
        good = [answer for answer in answers if answer.status == 200]
        times = spread([answer.seconds for answer in good])
        lasted = max(answer.ended for answer in answers) - min(answer.due for answer in answers)
        row = {
            "share": share,
            "offered": len(answers) / after[-1],
            "seconds": times,
            "latencies": sorted(answer.seconds for answer in good),
            "goodput": sum(answer.seconds <= deadline for answer in good) / lasted,
            "statuses": {str(status): count for status, count in sorted(Counter(a.status for a in answers).items())},
            "client_late": spread([answer.sent - answer.due for answer in answers]),
        }
        found.append(row)
        cells = "".join(f"{1000 * times[name]:>9.0f}" for name in ("median", "p95", "p99"))
        said = ", ".join(f"{count} x {status}" for status, count in row["statuses"].items())
        line(
            f"{share:>4}%{row['offered']:>13.2f}{cells}{times['p99'] / times['median']:>11.2f}{row['goodput']:>13.2f}"
            f"   {said}"
        )
    return found


def soak(count: int, line: Line) -> dict[str, Any]:
    """The server's resident memory after the first thousand requests and after the last."""
    from tests import tiny  # what the tests serve: the server is the same, the model too small to hide it

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tiny.write_base(folder / "base")
        tiny.write_adapter(folder / "adapter")
        settings = {"model": folder / "base", "adapter": folder / "adapter", "device": "cpu", "warmup": "quick"}
        with serving(folder, **settings, log_level="warning", threads=1) as server:
            client = Client(server.port, [{"inputs": text} for text in texts(500)])
            began, samples = time.perf_counter(), list[tuple[int, int]]()
            for start in range(0, count, SETTLING):
                numbers = range(start, min(count, start + SETTLING))
                _expect(asyncio.run(client.by(SOAK_CLIENTS, numbers)), {200})
                samples.append((numbers.stop, server.rss()))
            seconds = time.perf_counter() - began
    first, last = samples[0][1], samples[-1][1]
    line(
        f"\nsoak, {count} requests to the tests' tiny model by {SOAK_CLIENTS} clients in {seconds:.0f} s: "
        f"{first / 2**20:.1f} MiB after {samples[0][0]}, {last / 2**20:.1f} MiB at the end, {last / first - 1:+.2%}"
    )
    return {"requests": count, "seconds": seconds, "rss": samples, "growth": last / first - 1}


def _expect(answers: Sequence[Answer], allowed: set[int]) -> None:
    counts = Counter(answer.status for answer in answers)
    if not set(counts) <= allowed:
        raise RuntimeError(f"answers other than {sorted(allowed)}: {dict(counts)}")


@contextmanager
def _nobody() -> Iterator[None]:
    yield None


@contextmanager
def engine(options: argparse.Namespace, budget: int) -> Iterator[Callable[[Sequence[str]], float]]:
    """The engine in a process of its own, which computes nothing but when it is asked: prompts to seconds."""
    command = [sys.executable, "-m", "benchmarks.load", "--offline", str(budget)]
    command += ["--model", options.model, "--load-samples", str(options.load_samples)]
    command += [] if options.adapter is None else ["--adapter", str(options.adapter)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(prompts: Sequence[str]) -> float:
        assert process.stdin is not None  # pipes were asked for
        assert process.stdout is not None
        process.stdin.write(json.dumps(list(prompts)) + "\n")
        process.stdin.flush()
        return float(json.loads(process.stdout.readline()))

    try:
        run(["warm up"])
        yield run
    finally:
        process.kill()
        process.wait()


def _offline(options: argparse.Namespace) -> None:
    """Each line of standard input is a list of prompts; says what seconds the engine takes for them."""
    from scalabl_server.batching.jobs import SampledJob
    from scalabl_server.engines.load import load_engine
    from scalabl_server.settings import ServeSettings

    engine = load_engine(ServeSettings(**_settings(options), target_batch_tokens=options.offline))
    served = engine.adapter(None)
    job = SampledJob(served.draws(options.load_samples, engine.settings.seed), len(served.config.task.choices))
    for said in sys.stdin:
        sequences = sorted((served.prompter.encode(text) for text in json.loads(said)), key=len)
        batches: list[list[list[int]]] = []
        for ids in sequences:  # ascending, so that each is its pass's longest
            if not batches or (len(batches[-1]) + 1) * options.load_samples * len(ids) > options.offline:
                batches.append([])
            batches[-1].append(ids)
        began = time.perf_counter()
        for batch in batches:
            engine.run(served, batch, [job] * len(batch))
        print(json.dumps(time.perf_counter() - began), flush=True)


if __name__ == "__main__":
    main()
