"""Several adapters over one base model: which one is attached, and how one takes the place of another.

What an adapter attaches is decided in `scalabl_model`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import nn
from transformers import PreTrainedModel


class Host:
    """A base model's own modules, as they were before any adapter, and the adapter that is attached now.

    There is one host for each base model. It is made, and the base frozen, with the first adapter; it keeps the whole head,
    from which each adapter cuts its own. Nothing is locked: passes, `attach` and `detach` belong to one thread. Building
    an adapter only reads `modules`, which never change, so that any thread may do it while passes run.

    Attributes:
        modules: every module of the base by its path.
        head_name, head: the output head, None where the model has none.
        attached: the adapter that is attached, None for none.
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
    def forget(base: PreTrainedModel) -> None:
        """To be called before modules of the base are replaced for good; adapters made for it cannot be used afterwards."""
        host: Host | None = base.__dict__.pop("_scalabl_host", None)
        if host is not None and host.attached is not None:
            host.attached.detach()


class Hooks(Protocol):
    """What is attached and detached with an adapter beside its modules."""

    def attach(self) -> None: ...
    def detach(self) -> None: ...


class Attachment:
    """The modules with which one adapter replaces the base's own.

    Args:
        replacements: path in the base -> the module that takes its place.
        hooks: on the base's other modules.
    """

    def __init__(self, host: Host, replacements: Mapping[str, nn.Module], hooks: Hooks) -> None:
        self._host, self._hooks = host, hooks
        # The parents' own tables: replacing a module is one assignment, microseconds for a whole model.
        self._slots: list[tuple[dict[str, Any], str, nn.Module, nn.Module]] = []
        for path, replacement in replacements.items():
            parent, _, leaf = path.rpartition(".")
            self._slots.append((host.modules[parent]._modules, leaf, replacement, host.modules[path]))

    def attach(self) -> None:
        """Attach the adapter in place of the one that is attached; nothing happens when it is this one."""
        if self._host.attached is self:
            return
        if self._host.attached is not None:
            self._host.attached.detach()
        for table, leaf, replacement, _ in self._slots:
            table[leaf] = replacement
        self._hooks.attach()
        self._host.attached = self

    def detach(self) -> None:
        """Give the base its own modules back; nothing happens when another adapter is attached."""
        if self._host.attached is not self:
            return
        for table, leaf, _, original in self._slots:
            table[leaf] = original
        self._hooks.detach()
        self._host.attached = None
