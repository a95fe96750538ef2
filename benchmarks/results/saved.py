"""The scores of finished runs: a small JSON file each in `runs/`, which is committed. Adapters and logits are not here.

From these files the page can be made, and a study go on, with the repository alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SCORES = Path(__file__).parent / "runs"


def scores_of(name: str) -> dict[str, Any] | None:
    """What a run measured; None before it has finished."""
    path = SCORES / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def save_scores(name: str, scores: dict[str, Any]) -> None:
    """Write what a run measured."""
    SCORES.mkdir(exist_ok=True)
    (SCORES / f"{name}.json").write_text(json.dumps(scores, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
