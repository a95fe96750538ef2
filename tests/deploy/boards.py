"""Loads the committed dashboards for the tests, with their queries free of Grafana's variables."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

GRAFANA = Path(__file__).resolve().parents[2] / "deploy" / "grafana"
BOARDS: dict[str, dict[str, Any]] = {
    path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((GRAFANA / "dashboards").glob("*.json"))
}
PANELS = [(name, panel) for name, board in BOARDS.items() for panel in board["panels"] if panel["type"] != "row"]


def resolved(expr: str, interval: str = "1m") -> str:
    """A query as Grafana would send it, for the adapter `colours` and all replicas of the job `scalabl`."""
    values = {"namespace": ".*", "job": "scalabl", "adapter": "colours", "replica": ".*", "__rate_interval": interval}
    return re.sub(r"\$(\w+)", lambda variable: values[variable[1]], expr)
