"""How many rows of passes an input may take: what is known of it before it runs. What others took is in `admission`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RowDemand:
    """The rows that one input takes, in one pass or several.

    Attributes:
        at_once: the most that one pass holds of it.
        least, most: of all its passes together.
        learned_as: inputs with this name take about as many as those before them did; None where it is always `most`.
    """

    at_once: int
    least: int
    most: int
    learned_as: str | None = None

    @classmethod
    def fixed(cls, rows: int) -> RowDemand:
        """So many rows, all in one pass."""
        return cls(rows, rows, rows)
