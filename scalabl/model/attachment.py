"""Several adapters on one base model: which one is attached, and how one adapter replaces another.

Which modules an adapter replaces is decided in `scalabl_model`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn
from transformers import PreTrainedModel


class Host:
    """A base model's own modules, as they were before any adapter, and the adapter that is attached now.

    There is one host for each base model. It is created, and the base model frozen, with the first adapter. It keeps the
    complete head, from which each adapter copies its rows. There are no locks: one thread runs passes, attaches and
    detaches. Building an adapter only reads `modules`, which never change, so any thread may do it while passes run.

    Attributes:
        modules: every module of the base model by its path.
        head_name, head: the output head; None if the model has none.
        attached: the adapter that is attached; None if there is none.
    """

    def __init__(self, base: PreTrainedModel) -> None:
        base.requires_grad_(False)
        self.modules: dict[str, nn.Module] = dict(base.named_modules())
        self.head = base.get_output_embeddings()
        self.head_name = next((name for name, module in self.modules.items() if module is self.head), None)
        self.attached: Attachment | None = None

    @classmethod
    def of(cls, base: PreTrainedModel) -> Host:
        """The host of a base model, stored on the model itself so that it lives exactly as long."""
        host: Host | None = base.__dict__.get("_scalabl_host")
        if host is None:
            host = cls(base)
            base._scalabl_host = host
        return host

    @staticmethod
    def free(base: PreTrainedModel) -> None:
        """Detach the adapter that is attached to a base model, if there is one; its next pass attaches it again."""
        host: Host | None = base.__dict__.get("_scalabl_host")
        if host is not None and host.attached is not None:
            host.attached.detach()

    @staticmethod
    def forget(base: PreTrainedModel) -> None:
        """Drop the host before modules of the base are replaced for good; existing adapters cannot be used afterwards."""
        Host.free(base)
        base.__dict__.pop("_scalabl_host", None)


class Hooks(Protocol):
    """Hooks on the base model that are attached and detached together with an adapter."""

    def attach(self) -> None: ...
    def detach(self) -> None: ...


class Attachment:
    """The modules and hooks of one adapter, which can be put into the base model and taken out again.

    Args:
        replacements: path in the base model -> the module that replaces the one there.
        hooks: hooks on other modules of the base model.
    """

    def __init__(self, host: Host, replacements: Mapping[str, nn.Module], hooks: Hooks) -> None:
        self._host, self._hooks = host, hooks
        # Parents' module tables are changed directly: one assignment for each module, microseconds for a whole model.
        self._slots: list[tuple[dict[str, Any], str, nn.Module, nn.Module]] = []
        for path, replacement in replacements.items():
            parent, _, leaf = path.rpartition(".")
            self._slots.append((host.modules[parent]._modules, leaf, replacement, host.modules[path]))

    def attach(self) -> None:
        """Attach this adapter, after detaching another one if there is one. Does nothing if it is already attached."""
        if self._host.attached is self:
            return
        if self._host.attached is not None:
            self._host.attached.detach()
        for table, leaf, replacement, _ in self._slots:
            table[leaf] = replacement
        self._hooks.attach()
        self._host.attached = self

    def detach(self) -> None:
        """Restore the base model's own modules. Does nothing if this adapter is not attached."""
        if self._host.attached is not self:
            return
        for table, leaf, _, original in self._slots:
            table[leaf] = original
        self._hooks.detach()
        self._host.attached = None
