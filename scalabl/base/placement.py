"""Device maps (`--device-map`): a base model spread over several devices, with parts perhaps in main memory or on disk.

accelerate moves inputs and offloaded weights to the device on which a module computes, with hooks on the module's forward.
An adapter's layers have no such hooks, so they must be created on the device where the adapted module computes. Loading the
model is in `pretrained`.
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

AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate's strategies for dividing a model


def device_of(module: nn.Module) -> torch.device:
    """The device on which a module computes: where its weights are, or where accelerate moves them for each pass."""
    hook = getattr(module, "_hf_hook", None)
    for part in getattr(hook, "hooks", [hook]):
        device = getattr(part, "execution_device", None)
        if isinstance(device, int | str | torch.device):
            return torch.device(device)
    weight = next(module.parameters(), None)
    return weight.device if weight is not None else torch.device("cpu")


def is_divided(base: nn.Module) -> bool:
    """Whether a base model was loaded with a device map of more than one part."""
    return len(getattr(base, "hf_device_map", {})) > 1


@contextmanager
def weights_of(module: nn.Module) -> Iterator[None]:
    """Within this context a module's own weights can be read, even if they are offloaded to disk."""
    if getattr(module, "_hf_hook", None) is None:
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield


def read_device_map(value: str) -> str | dict[str, int | str]:
    """Read the value of `--device-map`: one of `AUTOMATIC`, or the path of a JSON file.

    The file maps module names to devices: a GPU number, a device name or "disk".

    Raises:
        BaseModelError: it is neither of the two, a device cannot be used, or accelerate is not installed.
    """
    if find_spec("accelerate") is None:
        raise BaseModelError("a device map needs the package accelerate; install it with: pip install accelerate")
    if value in AUTOMATIC:
        return value
    try:
        device_map = json.loads(Path(value).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        strategies = ", ".join(AUTOMATIC)
        raise BaseModelError(
            f"device map {value!r} is neither one of {strategies} nor a readable JSON file: {error}"
        ) from None
    if not isinstance(device_map, dict) or not device_map:
        raise BaseModelError(f"device map {value!r} must be a JSON object that maps module names to devices")
    for name, device in device_map.items():
        if isinstance(device, bool) or not isinstance(device, int | str):
            raise BaseModelError(
                f"device map {value!r}: the device of {name!r} is {device!r}; use a GPU number, a device name or disk"
            )
        if device != "disk":
            _check_device(value, name, device)
    return device_map


def left_out(base: nn.Module, device_map: dict[str, int | str]) -> str | None:
    """The first tensor of a base model that a device map does not place; transformers would leave it in main memory."""
    for name, _ in (*base.named_parameters(), *base.named_buffers()):
        if not any(not part or name == part or name.startswith(f"{part}.") for part in device_map):
            return name
    return None


def _check_device(value: str, name: str, device: int | str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise BaseModelError(f"device map {value!r}: the device {device!r} of {name!r} cannot be used: {first}") from None
