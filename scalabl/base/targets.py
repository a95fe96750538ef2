"""Which modules of a base model an adapter adapts: linear layers, found by name, by pattern, or all of them.

The names that `target_modules` may have follow PEFT. The adapted layer itself is in `model.layer`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from scalabl.config import AdapterConfig
from scalabl.errors import AdapterError

ALL_LINEAR = "all-linear"  # PEFT's word for every linear layer except the output head
NAMES = re.compile(r"[\w.\-]+(\s*,\s*[\w.\-]+)*\s*,?")  # a list of names; any other text is a regular expression


def is_adaptable(module: nn.Module) -> bool:
    """Whether `SubspaceLinear` can wrap a module: `nn.Linear`, quantised linear layers and GPT-2's `Conv1D`."""
    return isinstance(module, nn.Linear | Conv1D) or (
        isinstance(getattr(module, "in_features", None), int) and isinstance(getattr(module, "out_features", None), int)
    )


def features_of(module: nn.Module) -> tuple[int, int]:
    """(d_in, d_out) of an adaptable module."""
    if isinstance(module, Conv1D):
        return int(module.nx), int(module.nf)
    return int(module.in_features), int(module.out_features)  # type: ignore[arg-type]  # `is_adaptable`


def _layer_index(name: str) -> int | None:
    match = re.search(r"\.(\d+)\.", name)
    return int(match.group(1)) if match else None


def _check_layers(modules: Collection[str], layers: Sequence[int] | None) -> None:
    """Raise AdapterError for an index that is not that of a layer of the base model."""
    indices = {index for name in modules if (index := _layer_index(name)) is not None}
    absent = [index for index in layers or () if index not in indices]
    if absent and indices:
        raise AdapterError(
            f"layers_to_transform names layer {absent[0]}, but the base model's layers are {min(indices)} to {max(indices)}"
        )


def select(modules: Mapping[str, nn.Module], head_name: str | None, config: AdapterConfig, architecture: str) -> list[str]:
    """Names of the modules that a configuration adapts, in the base model's order.

    Raises:
        AdapterError: a target or a layer of the configuration has no module.
    """
    layers = config.layers_to_transform
    _check_layers(modules, layers)
    chosen, matched, seen_layers = [], set(), set()
    for name, module in modules.items():
        targets = [t for t in config.target_modules if name == t or name.endswith("." + t)]
        if not targets or not is_adaptable(module):
            continue
        index = _layer_index(name)
        if name != head_name and layers is not None:
            if index not in layers:
                continue
            seen_layers.add(index)
        matched.update(targets)
        chosen.append(name)
    missing = [t for t in config.target_modules if t not in matched]
    if missing:
        raise AdapterError(f"target module {missing[0]!r} matches no linear layer of the base model {architecture}")
    absent = [i for i in layers or () if i not in seen_layers]
    if absent and chosen != [head_name]:
        raise AdapterError(f"layers_to_transform names layer {absent[0]}, in which the base model has no target module")
    return chosen


def is_pattern(targets: str) -> bool:
    """Whether the text of `--target-modules` is `all-linear` or a regular expression, rather than a list of names."""
    return targets.lower() == ALL_LINEAR or NAMES.fullmatch(targets) is None


def text_modules(base: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules by name that a text can reach: all of them, or the language tower and the head of a multimodal model."""
    modules = dict(base.named_modules())
    if base.config.get_text_config(decoder=True) is base.config:
        return modules
    tower, head = base.get_decoder(), base.get_output_embeddings()
    prefix = next((name for name, module in modules.items() if module is tower), "")
    if not prefix:
        return modules
    return {n: module for n, module in modules.items() if n == prefix or n.startswith(prefix + ".") or module is head}


def targets_of(base: PreTrainedModel, targets: str | Sequence[str]) -> tuple[str, ...]:
    """`target_modules` for a new adapter, from what was asked for.

    Args:
        targets: names of modules, or the ends of names, as in `AdapterConfig.target_modules`; or a text: `all-linear` for
            every linear layer except the output head, or a regular expression for whole names, as PEFT has them.

    Returns:
        The given names; or other names of the same modules, where the given ones would match modules that no text reaches
        or are a text.

    Raises:
        AdapterError: no linear layer matches, or the regular expression is not valid.
    """
    reachable = {name: module for name, module in text_modules(base).items() if is_adaptable(module)}
    if not isinstance(targets, str):
        matched = [name for name, module in base.named_modules() if is_adaptable(module) and _ends_in(name, targets)]
        inside = [name for name in matched if name in reachable]
        if inside == matched:
            return tuple(targets)  # if one of them matches nothing, `select` says so
        for target in targets:
            if not any(_ends_in(name, (target,)) for name in inside):
                raise AdapterError(
                    f"target module {target!r} is not a linear layer of the part of {type(base).__name__} that reads text"
                )
        return short_names(inside, base)
    if targets.lower() == ALL_LINEAR:
        head = base.get_output_embeddings()
        chosen = [name for name, module in reachable.items() if module is not head]
    else:
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise AdapterError(f"target_modules {targets!r} is not a valid regular expression: {error}") from None
        chosen = [name for name in reachable if pattern.fullmatch(name)]
    if not chosen:
        example = next(iter(reachable), "")
        raise AdapterError(
            f"target_modules {targets!r} matches no linear layer of the base model {type(base).__name__}; a regular "
            f"expression must match the whole name of a layer, such as {example!r}"
        )
    return short_names(chosen, base)


def _ends_in(name: str, targets: Sequence[str]) -> bool:
    return any(name == target or name.endswith("." + target) for target in targets)


def short_names(names: Collection[str], base: PreTrainedModel) -> tuple[str, ...]:
    """The last parts of these modules' names if no other module's name ends in one of them, else the full names."""
    short = tuple(dict.fromkeys(name.rpartition(".")[2] for name in names))
    matched = {name for name, _ in base.named_modules() if name.rpartition(".")[2] in short}
    return short if matched == set(names) else tuple(names)
