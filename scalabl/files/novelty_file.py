"""The file `novelty.safetensors` beside an adapter: validated reading and writing of its novelty reference.

What the numbers mean is in `uncertainty.novelty`; what the file was made from stands in `adapter_config.json`.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from scalabl.config import AdapterConfig, Novelty
from scalabl.errors import AdapterError
from scalabl.files.adapter_directory import CONFIG_FILE, NOVELTY_FILE, WEIGHTS_FILE, save_config
from scalabl.files.atomic import write_file
from scalabl.uncertainty.novelty import NoveltyReference

REMEDY = "make it again with `scalabl calibrate --reference`"
UNIT_TOLERANCE = 5e-3  # of a vector's length after float16


def weights_sha256(folder: Path) -> str:
    """SHA-256 of an adapter's weights file, which ties a novelty reference to it.

    Raises:
        AdapterError: the file cannot be read.
    """
    try:
        with (folder / WEIGHTS_FILE).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise AdapterError(f"{error.filename} cannot be read: {error.strerror}") from None


def save_novelty(folder: Path, config: AdapterConfig, novelty: Novelty, reference: NoveltyReference) -> AdapterConfig:
    """Write a novelty reference beside an adapter, and what made it into the adapter's configuration, which is returned.

    The configuration is written last: until then it names no reference, or the tensors do not fit what it says.
    """
    tensors = {
        "mean": reference.mean.float(),
        "projection": reference.projection.half(),
        "rows": reference.rows.half(),
        "probe": reference.probe.float(),
    }
    if reference.calibration is not None:
        tensors["calibration"] = reference.calibration
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata={"format": "pt"})
    write_file(folder / NOVELTY_FILE, content)
    changed = config.with_novelty(novelty)
    save_config(folder, changed)
    return changed


def read_novelty(folder: Path, config: AdapterConfig, width: int) -> NoveltyReference | None:
    """The novelty reference of an adapter; None if its configuration names none.

    Args:
        width: of the hidden states that the base model's head reads.

    Raises:
        AdapterError: the file is missing, broken, or belongs to another base model or other weights. The message names it.
    """
    novelty = config.novelty
    if novelty is None:
        return None
    path = folder / NOVELTY_FILE
    if novelty.base_model_name_or_path != config.base_model_name_or_path:
        raise AdapterError(
            f"{path} was made with the base model {novelty.base_model_name_or_path!r}, and {CONFIG_FILE} names "
            f"{config.base_model_name_or_path!r}; {REMEDY}"
        )
    if novelty.width != width:
        raise AdapterError(
            f"{path} was made with a base model whose hidden states have {novelty.width} numbers, and those of this one "
            f"have {width}; {REMEDY}"
        )
    if novelty.weights_sha256 != weights_sha256(folder):
        raise AdapterError(f"{path} was made with another {WEIGHTS_FILE} than the one beside it; {REMEDY}")
    return _checked(path, novelty, _tensors(path))


def _tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise AdapterError(f"{path} does not exist, and {CONFIG_FILE} has a novelty reference; {REMEDY}")
    try:
        return {
            name: tensor.double() if name == "calibration" else tensor.float()
            for name, tensor in load(path.read_bytes()).items()
        }
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path} is not a safetensors file: {error}; {REMEDY}") from None


def _checked(path: Path, novelty: Novelty, tensors: dict[str, Tensor]) -> NoveltyReference:
    shapes = {
        "mean": [novelty.width],
        "projection": [novelty.components, novelty.width],
        "rows": [novelty.rows, novelty.components],
        "probe": [novelty.components],
    }
    if novelty.calibration is not None:
        shapes["calibration"] = [novelty.calibration.data.rows]
    if wrong := sorted(tensors.keys() ^ shapes.keys()):
        state = "missing from" if wrong[0] in shapes else "not one that belongs into"
        raise AdapterError(f"tensor {wrong[0]!r} is {state} {path}; {REMEDY}")
    for name, shape in shapes.items():
        tensor = tensors[name]
        if list(tensor.shape) != shape:
            raise AdapterError(
                f"tensor {name!r} of {path} has shape {list(tensor.shape)}; {CONFIG_FILE} requires {shape}; {REMEDY}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"tensor {name!r} of {path} has values that are not finite; {REMEDY}")
    for name in ("rows", "probe"):
        if float((tensors[name].norm(dim=-1) - 1).abs().max()) > UNIT_TOLERANCE:
            raise AdapterError(f"tensor {name!r} of {path} has vectors that are not of unit length; {REMEDY}")
    calibration = tensors.get("calibration")
    if calibration is not None and not (bool((calibration.diff() >= 0).all()) and float(calibration.abs().max()) <= 1.01):
        raise AdapterError(f"tensor 'calibration' of {path} is not a list of scores from -1 to 1, ascending; {REMEDY}")
    return NoveltyReference(
        mean=tensors["mean"],
        projection=tensors["projection"],
        rows=tensors["rows"],
        probe=tensors["probe"],
        calibration=calibration,
        neighbours=novelty.neighbours,
    )
