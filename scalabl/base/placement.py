"""Where the parts of a base model compute when it lies on several devices, or in part in memory or on disk (`--device-map`).

accelerate brings inputs and offloaded weights to the device where a part computes, by hooks on its forward. What an adapter
adds to a part has no such hooks: it is made where the part computes, and follows what the part gives.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import nn

from scalabl.errors import BaseModelError

AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate's own ways to divide a model


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: where its weights are, or where they come to for each pass."""
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", [hook]):
        device = getattr(part, "execution_device", None)
        if isinstance(device, int | str | torch.device):
            return torch.device(device)
    weight = next(module.parameters(), None)
    return weight.device if weight is not None else torch.device("cpu")


def is_divided(base: nn.Module) -> bool:
    """Whether a base model was loaded by a device map of more than one part."""
    return len(getattr(base, "hf_device_map", {})) > 1


@contextmanager
def weights_of(module: nn.Module) -> Iterator[None]:
    """A module's own weights can be read within, also those that are on disk."""
    if getattr(module, "_hf_hook", None) is None:
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield


def read_device_map(given: str) -> str | dict[str, int | str]:
    """What `--device-map` says: one of `AUTOMATIC`, or a JSON file: module names and their devices (a number, a name, disk).

    Raises:
        BaseModelError: neither, a device that is not there, or accelerate is missing.
    """
    if find_spec("accelerate") is None:
        raise BaseModelError("a device map needs the package accelerate; install it with: pip install accelerate")
    if given in AUTOMATIC:
        return given
    try:
        device_map = json.loads(Path(given).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        ways = ", ".join(AUTOMATIC)
        raise BaseModelError(f"device map {given!r}: neither {ways} nor a file that can be read as JSON: {error}") from None
    if not isinstance(device_map, dict) or not device_map:
        raise BaseModelError(f"device map {given!r}: an object is needed, of module names and their devices")
    for name, device in device_map.items():
        if isinstance(device, bool) or not isinstance(device, int | str):
            raise BaseModelError(
                f"device map {given!r}: {name!r} has {device!r}; a number, a device's name or disk is needed"
            )
        if device != "disk":
            _check(given, name, device)
    return device_map


def left_out(base: nn.Module, device_map: dict[str, int | str]) -> str | None:
    """The first tensor of a base model that a map does not place; transformers would leave it in memory."""
    for name, _ in (*base.named_parameters(), *base.named_buffers()):
        if not any(not part or name == part or name.startswith(f"{part}.") for part in device_map):
            return name
    return None


def _check(given: str, name: str, device: int | str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise BaseModelError(f"device map {given!r}: {name!r} is on {device!r}, which cannot be used: {first}") from None
