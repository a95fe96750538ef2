"""The scores of finished runs: a small JSON file each in `runs/`, which is committed. Adapters and logits are not here.

From these files the page can be made, and a study go on, with the repository alone. Each says what it was made from, so that
the scores of another plan, of other data or of other code are never taken for those of a run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

SCORES = Path(__file__).parent / "runs"
# Of the study's code. Increase it when a change in the code changes what a run measures.
CODE = 1


class OtherRunError(RuntimeError):
    """Saved scores or logits that were made from something else."""


def scores_of(name: str, made_from: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """What a run measured; None before it has finished.

    Args:
        made_from: what the run is made from; None to read whatever is there.

    Raises:
        OtherRunError: the scores were made from something else.
    """
    path = SCORES / f"{name}.json"
    if not path.is_file():
        return None
    scores: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if made_from is not None:
        changed = _changed(scores.get("made_from"), _as_read(made_from))
        if changed:
            raise OtherRunError(f"{path} was made from something else ({', '.join(changed)}); remove it to run {name} again")
    return scores


def save_scores(name: str, scores: Mapping[str, Any], made_from: Mapping[str, Any]) -> None:
    """Write what a run measured, and what it was made from."""
    SCORES.mkdir(exist_ok=True)
    content = {**scores, "made_from": made_from}
    (SCORES / f"{name}.json").write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def save_logits(path: Path, logits: Mapping[str, Tensor], made_from: Mapping[str, Any]) -> None:
    """Write a run's logits, and what they were made from."""
    save_file({name: tensor.clone() for name, tensor in logits.items()}, path, metadata={"made_from": _sha256(made_from)})


def read_logits(path: Path, made_from: Mapping[str, Any]) -> dict[str, Tensor]:
    """A run's logits.

    Raises:
        OtherRunError: they were made from something else.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
    if metadata.get("made_from") != _sha256(made_from):
        raise OtherRunError(f"{path} was made from something else; remove it, or choose another --folder")
    return load_file(path)


def _as_read(content: Mapping[str, Any]) -> Any:
    """As it comes back from a JSON file: tuples are lists there."""
    return json.loads(json.dumps(content))


def _sha256(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _changed(old: Any, new: Any, name: str = "") -> list[str]:
    """Names of the values in `old` that are others in `new`. A setting that is newer than the file is not compared."""
    if isinstance(old, dict) and isinstance(new, dict):
        parts = [_changed(value, new.get(key), f"{name}.{key}" if name else key) for key, value in old.items()]
        return [change for part in parts for change in part]
    if old is None and not name:
        return ["it does not say what"]
    return [] if old == new else [name]
