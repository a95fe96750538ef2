"""What the host prepares for a pass, brought to the model's device without the host waiting for it.

A copy from ordinary memory to a GPU, and any number that the host reads from a GPU, makes the host wait. So index tables are
computed on the CPU and travel together, from pinned memory; what does not change stays on the device.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

ALIGNED = 8  # tables begin at a multiple of 8 numbers (64 bytes): Triton would compile another kernel for odd addresses

# A tensor on the CPU -> its copies by device.
_copies: MutableMapping[Tensor, dict[torch.device, Tensor]] = WeakTensorKeyDictionary()


def on_host(device: torch.device) -> bool:
    """Whether the device shares the host's memory and work, so that nothing has to be brought there."""
    return device.type == "cpu"


def moved(tables: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tables of int64 on the CPU, on the device: as one copy, which the host does not wait for."""
    if on_host(device):
        return list(tables)
    sizes = [-(-table.numel() // ALIGNED) * ALIGNED for table in tables]
    buffer = torch.zeros(sum(sizes), dtype=torch.int64)
    for part, table in zip(torch.split(buffer, sizes), tables, strict=True):
        part[: table.numel()] = table.flatten()
    if device.type == "cuda":
        buffer = buffer.pin_memory()
    parts = torch.split(buffer.to(device, non_blocking=True), sizes)
    return [part[: table.numel()].view(table.shape) for part, table in zip(parts, tables, strict=True)]


def kept(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor that nobody changes, on the device; copied there once, and kept as long as the tensor itself."""
    if on_host(device) or tensor.device == device:
        return tensor
    copies = _copies.setdefault(tensor, {})
    if device not in copies:
        copies[device] = (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
    return copies[device]
