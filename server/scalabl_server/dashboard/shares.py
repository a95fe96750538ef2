"""A share of a count with its confidence interval, for every figure of the dashboard."""

from __future__ import annotations

import math

from scalabl_server.dashboard.schemas import Share

Z = 1.959963984540054  # the normal distribution's 97.5% quantile


def share(count: float, total: float) -> Share:
    """A share with its 95% Wilson interval (Wilson 1927), which stays within [0, 1] and is reliable for few trials too."""
    count, total = round(count), round(total)
    if total <= 0:
        return Share(count=0, total=0, share=None, low=None, high=None)
    p, z2 = count / total, Z * Z / total
    middle, half = p + z2 / 2, Z * math.sqrt(p * (1 - p) / total + z2 / (4 * total))
    low, high = (middle - half) / (1 + z2), (middle + half) / (1 + z2)
    # For a share of 0 or 1 the interval reaches exactly 0 or 1; rounding could make it miss.
    return Share(count=count, total=total, share=p, low=low if count else 0.0, high=high if count < total else 1.0)
