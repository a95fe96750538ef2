"""`RowDemand`: how many batch rows an input may take, as known before it runs. What inputs really took: `admission`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RowDemand:
    """The batch rows that one input may take, in one pass or several.

    Attributes:
        at_once: the most rows in a single pass.
        least, most: limits on the rows of all passes together.
        learned_as: the group of inputs with which the expected number of rows is learned; None if it is always `most`.
    """

    at_once: int
    least: int
    most: int
    learned_as: str | None = None

    @classmethod
    def fixed(cls, rows: int) -> RowDemand:
        """Exactly this many rows, all in one pass."""
        return cls(rows, rows, rows)
