"""The head for sequence classification that PEFT trains and saves with a LoRA, and the names of its classes.

The LoRA itself is read in `peft_import`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalabl.errors import AdapterError
from scalabl.files.adapter_directory import CONFIG_FILE, WEIGHTS_FILE

# PEFT names both for sequence classification, whatever the base model's class calls its head; of a decoder it is `score`.
HEADS = ("classifier", "score")
HEAD = re.compile(r"^base_model\.model\.(?P<name>classifier|score)\.(?P<kind>.+)$")


def read_head(folder: Path, config: dict[str, Any], tensors: Mapping[str, Tensor]) -> Tensor | None:
    """The rows of the head that was trained with a LoRA for sequence classification; None for another LoRA.

    Raises:
        AdapterError: other modules were trained too, or the head is missing, or not one matrix for a decoder's classes.
    """
    saved = config.get("modules_to_save") or []
    is_classifier = config.get("task_type") == "SEQ_CLS"
    parts = {match["name"] + "." + match["kind"]: tensor for key, tensor in tensors.items() if (match := HEAD.match(key))}
    if any(name not in HEADS for name in saved) or (saved and not parts and not is_classifier):
        raise AdapterError(
            f"{folder / CONFIG_FILE}: modules_to_save is {saved!r}, which cannot be converted; beside a LoRA only the head "
            "'score' of sequence classification can"
        )
    if not parts and not is_classifier:
        return None
    if parts.keys() != {"score.weight"} or parts["score.weight"].dim() != 2:
        has = ", ".join(sorted(parts)) or "none"
        raise AdapterError(
            f"{folder / WEIGHTS_FILE}: the head must be one tensor score.weight, as a decoder's for sequence classification "
            f"(found: {has}); train with task_type SEQ_CLS and modules_to_save ['score']"
        )
    rows = parts["score.weight"].float()
    if not bool(torch.isfinite(rows).all()):
        raise AdapterError(f"{folder / WEIGHTS_FILE}: 'score' has values that are not finite")
    settings = settings_of(folder)
    if len(rows) < 2 or settings.get("problem_type") in ("regression", "multi_label_classification"):
        raise AdapterError(
            f"{folder}: the head has {len(rows)} rows for {settings.get('problem_type', 'one number')}; only a head that "
            "tells two or more classes apart can be converted"
        )
    return rows


def class_names(config: Mapping[str, Any], count: int) -> tuple[str, ...] | None:
    """The names of `count` classes in `id2label` of a model's configuration; None if it has none but LABEL_0 and so on."""
    id2label = {int(index): str(name) for index, name in (config.get("id2label") or {}).items()}
    names = tuple(id2label.get(index, "") for index in range(count))
    generic = all(name == f"LABEL_{index}" for index, name in enumerate(names))
    return None if generic or len(id2label) != count or not all(names) or len(set(names)) < count else names


def settings_of(folder: Path) -> dict[str, Any]:
    """The contents of the model's `config.json` in a LoRA's folder; empty without one."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def is_of_head(key: str) -> bool:
    """Whether the tensor of this name in a LoRA's file is a part of a head for sequence classification."""
    return HEAD.match(key) is not None
