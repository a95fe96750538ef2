"""How many times as long one method took as another, round by round."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def ratio(slow: Sequence[float], fast: Sequence[float]) -> dict[str, float]:
    """How many times as long the one took as the other: the median over rounds, and the range."""
    each = [one / other for one, other in zip(slow, fast, strict=True)]
    return {"median": statistics.median(each), "lowest": min(each), "highest": max(each)}


def shown(found: dict[str, float]) -> str:
    """The median, and the range in brackets."""
    return f"{found['median']:.2f} ({found['lowest']:.2f}-{found['highest']:.2f})"
