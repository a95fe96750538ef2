"""Computes the dashboard's figure of novelty from recent predictions. Pure; the other figures are in `summaries`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from scalabl_server.dashboard.schemas import Share, TrafficNovelty
from scalabl_server.dashboard.shares import share
from scalabl_server.outcomes.survey import Seen

BINS = 20  # of p-values, of equal width; each includes its upper edge


@dataclass(frozen=True)
class NoveltyRule:
    """What an adapter knows of novelty: its level, its number of calibration rows, and this process's martingale so far."""

    level: float
    calibration_rows: int
    highest_log10: float


def traffic_novelty(recent: Sequence[Seen], rule: NoveltyRule | None) -> TrafficNovelty | None:
    """How the p-values of recent predictions are distributed; None if the adapter has none. `recent` is newest first."""
    if rule is None:
        return None
    compared = [(prediction, p) for prediction in recent if (p := _p_value(prediction)) is not None]
    counts = [0] * BINS
    for _, p in compared:
        counts[min(BINS - 1, max(0, math.ceil(p * BINS - 1e-9) - 1))] += 1
    novel: Share = share(sum(p <= rule.level for _, p in compared), len(compared))
    return TrafficNovelty(
        level=rule.level,
        calibration_rows=rule.calibration_rows,
        highest_log10=rule.highest_log10,
        count=len(compared),
        left_out=len(recent) - len(compared),
        oldest=_time(compared[-1][0]) if compared else None,
        newest=_time(compared[0][0]) if compared else None,
        counts=counts,
        novel=novel,
    )


def _p_value(prediction: Seen) -> float | None:
    novelty = prediction.answer.get("novelty")
    return None if novelty is None else novelty["p_value"]


def _time(seen: Seen) -> datetime:
    return datetime.fromtimestamp(seen.created_at, UTC)
