"""Where the modules of a PEFT LoRA are in a base model. The LoRA itself is read in `peft_import`."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

from scalabl.base.targets import text_modules
from scalabl.errors import AdapterError

# What the classes of an architecture put before a decoder's own names: `model.layers` in the class for text alone,
# `model.language_model.layers` or, before transformers 4.52, `language_model.model.layers` in the one for images too.
WRAPPERS = re.compile(r"^((model|language_model|text_model|transformer|decoder)\.)*")
EXPERT = re.compile(r"\.experts(\.|$)")

logger = logging.getLogger("scalabl")


def located(names: Iterable[str], base: PreTrainedModel) -> dict[str, str]:
    """Name in the LoRA -> name in the base model, for the modules that a text reaches.

    A LoRA may have been trained on another class of the same architecture, whose names begin differently. Modules that no
    text reaches, such as those of a vision tower, are left out, since answers about texts do not depend on them.

    Raises:
        AdapterError: the base model does not have one of the modules, or a text reaches none of them.
    """
    modules = dict(base.named_modules())
    reachable = text_modules(base)
    places: dict[str, str] = {}
    left_out: list[str] = []
    for name in names:
        if name in modules and name not in reachable:
            left_out.append(name)
            continue
        place = renamed(name, base)
        if place is None and EXPERT.search(name):
            raise AdapterError(
                f"the LoRA adapts {name!r}, a routed expert, of which each token uses others; such a LoRA cannot be served; "
                "train one without the experts"
            )
        if place is None:
            raise AdapterError(f"the LoRA adapts {name!r}, which the base model {type(base).__name__} does not have")
        places[name] = place
    if left_out and not places:
        raise AdapterError(
            f"the LoRA adapts only parts of {type(base).__name__} that no text reaches, first {left_out[0]!r}"
        )
    if left_out:
        logger.warning(
            "%d modules of the LoRA are left out, because no text reaches them, first %r", len(left_out), left_out[0]
        )
    return places


def renamed(name: str, base: PreTrainedModel) -> str | None:
    """The name in the base model of a module that has this name in a class of its architecture; None if there is none."""
    modules: dict[str, nn.Module] = dict(base.named_modules())
    if name in modules:
        return name
    end = WRAPPERS.sub("", name)
    tower, head = base.get_decoder(), base.get_output_embeddings()
    for path, module in modules.items():
        if module is head and path.rpartition(".")[2] == end:
            return path
        if module is tower and f"{path}.{end}" in modules:
            return f"{path}.{end}"
    return None
