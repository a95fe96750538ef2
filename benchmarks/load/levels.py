"""Latency under Poisson arrivals at shares of the saturation rate. Measuring that rate is in `saturation`."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from benchmarks.load.client import Client, expect_statuses
from benchmarks.processes.server import Server
from benchmarks.report import Line
from benchmarks.timing import spread


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
    rows = []
    for share in shares:
        chance, at, after = random.Random(1), 0.0, []
        for _ in bodies:
            at += chance.expovariate(rate * share / 100)
            after.append(at)
        client = Client(server.port, bodies, x_request_timeout=f"{deadline:.3f}")
        answers = asyncio.run(client.open_loop(after))
        expect_statuses(answers, {200, 429, 504})
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
        rows.append(row)
        cells = "".join(f"{1000 * times[name]:>9.0f}" for name in ("median", "p95", "p99"))
        said = ", ".join(f"{count} x {status}" for status, count in row["statuses"].items())
        line(
            f"{share:>4}%{row['offered']:>13.2f}{cells}{times['p99'] / times['median']:>11.2f}{row['goodput']:>13.2f}"
            f"   {said}"
        )
    return rows
