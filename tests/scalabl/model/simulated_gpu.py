"""A GPU that computes nothing, on a machine without one: it records every place where the host would wait for the device.

Tensors on it are torch's fake tensors: they have shapes and a CUDA device, and no values. So nothing that reads a value can
be overlooked. Tensors on the CPU are real.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import scalabl_kernels.fused
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from scalabl.model.head import ChoiceHead
from scalabl.model.scalabl_model import ScalaBLModel

DEVICE = torch.device("cuda", 0)
# Operators whose result, or the size of it, the host has to read from the device.
READ = (
    "_local_scalar_dense",
    "is_nonzero",
    "nonzero",
    "unique",
    "masked_select",
    "equal",
    "repeat_interleave.Tensor",
)


class SimulatedGpu(TorchDispatchMode):
    """Use within `simulated_gpu`.

    Attributes:
        waits: where the host would wait: values read, and copies between ordinary memory and the device.
        copies: copies that the host does not wait for, by their bytes.
        operators: how many operators ran on the device.
    """

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()
        self._mode = mode
        self.waits: list[str] = []
        self.copies: list[int] = []
        self.operators = 0
        self._pinned: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(func).removeprefix("aten.")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = any(isinstance(tensor, FakeTensor) for tensor in tensors)
        if name.startswith(("pin_memory", "_pin_memory")):  # no driver is here: a copy is remembered as pinned
            with _disable_current_modes():
                pinned: Tensor = args[0].clone()
            self._pinned.add(pinned.untyped_storage().data_ptr())
            return pinned
        if name.startswith("is_pinned"):
            return args[0].untyped_storage().data_ptr() in self._pinned
        goes_there = torch.device(kwargs.get("device") or "cpu").type == "cuda"
        if not here and not goes_there:
            with _disable_current_modes():
                return func(*args, **kwargs)
        self.operators += 1
        masked = name.startswith("index") and any(tensor.dtype == torch.bool for tensor in tensors[1:])
        if masked or any(name.startswith(read) for read in READ):
            self.waits.append(f"{name} {_place()}")
        if goes_there and tensors and not here:
            self._copied_here(name, tensors[0], kwargs)
        if here and (target := kwargs.get("device")) is not None and torch.device(target).type == "cpu":
            self.waits.append(f"{name} to the host {_place()}")
            with _disable_current_modes():
                return torch.zeros(tensors[0].shape, dtype=kwargs.get("dtype") or tensors[0].dtype)
        for tensor in tensors:  # one number may travel with the launch; more has to be copied, and is not pinned
            if not isinstance(tensor, FakeTensor) and here and tensor.dim():
                self.waits.append(f"{name} with a tensor on the host {_place()}")
        fake_args, fake_kwargs = tree_map_only(Tensor, self._fake, (args, kwargs))
        return func(*fake_args, **fake_kwargs)

    def _fake(self, tensor: Tensor) -> Tensor:
        if isinstance(tensor, FakeTensor):
            return tensor
        with _disable_current_modes():
            return self._mode.from_tensor(tensor)

    def _copied_here(self, name: str, tensor: Tensor, kwargs: dict[str, Any]) -> None:
        pinned = tensor.untyped_storage().data_ptr() in self._pinned
        if pinned and kwargs.get("non_blocking"):
            self.copies.append(tensor.nbytes)
        else:
            self.waits.append(f"{name} from {'pinned' if pinned else 'ordinary'} memory {_place()}")


class _Indexing(TorchFunctionMode):
    """`x[...]` and `contiguous` by operators: what their usual forms do first needs a torch that was built for CUDA."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is Tensor.__getitem__ and isinstance(args[0], FakeTensor):
            tensor, indices = _sliced(*args)
            return torch.ops.aten.index.Tensor(tensor, indices) if indices else tensor
        if func is Tensor.__setitem__ and isinstance(args[0], FakeTensor):
            tensor, indices = _sliced(*args[:2])
            return torch.ops.aten.index_put_(tensor, indices, args[2]) if indices else tensor.copy_(args[2])
        if func is Tensor.contiguous and isinstance(args[0], FakeTensor):
            return (
                args[0] if args[0].is_contiguous() else torch.ops.aten.clone(args[0], memory_format=torch.contiguous_format)
            )
        return func(*args, **(kwargs or {}))


def _sliced(tensor: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None]]:
    """The tensor after all parts of an index but tensors, and the tensors by dimension; an empty list if there are none."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if all(part is not Ellipsis for part in parts):
        parts.append(Ellipsis)
    dimension, indices = 0, list[Tensor | None]()
    for place, part in enumerate(parts):
        if part is Ellipsis:
            after = sum(other is not None for other in parts[place + 1 :])
            indices += [None] * (tensor.dim() - dimension - after)
            dimension = len(indices)
            continue
        if part is None:
            tensor = tensor.unsqueeze(dimension)
        elif isinstance(part, int):
            tensor = tensor.select(dimension, part)
            continue
        elif isinstance(part, slice):
            tensor = torch.ops.aten.slice.Tensor(tensor, dimension, part.start, part.stop, part.step or 1)
        indices.append(torch.as_tensor(part) if isinstance(part, Tensor | list) else None)
        dimension += 1
    return tensor, indices if any(part is not None for part in indices) else []


def _place() -> str:
    """Where in the project or in transformers the running operator was called."""
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if ("/scalabl/" in file or "/transformers/" in file) and "simulated" not in file:
            return f"at {file.rpartition('/')[2]}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


@contextmanager
def simulated_gpu(monkeypatch: Any) -> Iterator[SimulatedGpu]:
    """Within this context a device "cuda" exists. The kernel's launch, which needs a driver, is left out."""

    def launch(y: Tensor, x: Tensor, a: Tensor, b: Tensor, s: Tensor, sample: Tensor, *rest: Any) -> None:
        assert {tensor.device for tensor in (y, x, a, b, s, sample)} == {DEVICE}

    monkeypatch.setattr(scalabl_kernels.fused, "subspace_projection_fused", launch)
    mode = FakeTensorMode()
    gpu = SimulatedGpu(mode)
    with mode, gpu, _Indexing():
        yield gpu


def put_there(model: ScalaBLModel) -> None:
    """Put a model on the simulated GPU; its values are gone."""
    for module in {*model.modules(), *model.base.modules()}:
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                there = torch.empty(parameter.shape, dtype=parameter.dtype, device=DEVICE)
                module._parameters[name] = nn.Parameter(there, requires_grad=False)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device=DEVICE)
        if isinstance(module, ChoiceHead):
            module._device = DEVICE
