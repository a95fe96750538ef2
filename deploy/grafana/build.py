"""Writes the dashboards' JSON files: `python -m deploy.grafana.build`. They are committed; a test checks that they match."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from deploy.grafana import calibration, service

FOLDER = Path(__file__).with_name("dashboards")


def rendered() -> dict[str, str]:
    """File name -> JSON text of a dashboard."""
    texts = {}
    for name, make in (("calibration.json", calibration.build), ("service.json", service.build)):
        board: dict[str, Any] = json.loads(json.dumps(make().build(), cls=JSONEncoder))
        for number, panel in enumerate(board["panels"], 1):
            panel["id"] = number
        texts[name] = json.dumps(board, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    return texts


if __name__ == "__main__":
    for name, text in rendered().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
