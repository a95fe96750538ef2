"""Where the example's adapter and queries lie, which most benchmarks run on. How they were made is in `examples`."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "intent_router"
ADAPTER = FOLDER / "adapter"


def queries() -> list[str]:
    """The example's queries, one a line."""
    return (FOLDER / "queries.txt").read_text(encoding="utf-8").splitlines()
