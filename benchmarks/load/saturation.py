"""Requests answered per second when all are sent at once, beside the engine alone. Arrivals over time are in `levels`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.load.client import Client, expect_statuses
from benchmarks.processes.server import Server
from benchmarks.report import Line
from benchmarks.timing import spread


def saturation(
    server: Server,
    bodies: Sequence[dict[str, object]],
    engine: Callable[[Sequence[str]], float] | None,
    rounds: int,
    line: Line,
) -> dict[str, Any]:
    """Requests per second when all come at once, and in turns what the engine alone makes of the same prompts."""
    prompts = [str(body["inputs"]) for body in bodies]
    served, alone = list[float](), list[float]()
    for _ in range(rounds):
        if engine is not None:
            alone.append(len(prompts) / engine(prompts))
        answers = asyncio.run(Client(server.port, bodies).at_once(len(bodies)))
        expect_statuses(answers, {200})
        served.append(len(answers) / (max(a.ended for a in answers) - min(a.sent for a in answers)))
    result: dict[str, Any] = {"server": spread(served), "server_rounds": served}
    text = f"saturation: {result['server']['median']:.2f} requests per second ({min(served):.2f} to {max(served):.2f})"
    if engine is not None:
        shares = [one / other for one, other in zip(served, alone, strict=True)]
        result |= {"engine": spread(alone), "engine_rounds": alone, "share_of_engine": spread(shares)}
        text += (
            f", the engine alone {result['engine']['median']:.2f}: {result['share_of_engine']['median']:.1%} of it "
            f"({min(shares):.1%} to {max(shares):.1%}, {rounds} rounds in turns)"
        )
    line(text)
    return result
