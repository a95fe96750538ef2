"""Combining adapters of one base model and task into one adapter: a mixture with their members."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from scalabl.config import AdapterConfig
from scalabl.errors import AdapterError, OutputError
from scalabl.files.adapter_directory import WEIGHTS_FILE, read_config, read_weights
from scalabl.files.output_folder import check_unused, write_adapter

# What the members of a mixture have in common, besides the fields of the task.
IN_COMMON = ("base_model_name_or_path", "r", "lora_alpha", "target_modules", "layers_to_transform", "covariance")
SHOWN = 80  # characters of a value in a message


def combine(adapters: Sequence[Path], output: Path, *, overwrite: bool = False) -> AdapterConfig:
    """Write an adapter whose members are those of the given adapters, in their order.

    Calibrations, with posterior scale and temperature, and novelty references do not hold for the mixture and are left out.

    Raises:
        AdapterError: one of them is malformed or given twice, or they differ; the message names the field or the tensor.
        OutputError: `output` is not empty and `overwrite` is false, or it is one of the adapters.
    """
    if len(adapters) < 2:
        raise AdapterError("a mixture needs at least two adapters")
    places: dict[Path, Path] = {}
    for folder in adapters:
        if (place := folder.resolve()) in places:
            raise AdapterError(f"{folder} is given twice; members must be different adapters")
        places[place] = folder
    if output.resolve() in places:
        raise OutputError(f"{output} is one of the adapters to combine; choose another --output")
    check_unused(output, overwrite=overwrite)
    configs = [read_config(folder) for folder in adapters]
    for folder, config in zip(adapters[1:], configs[1:], strict=True):
        _check_alike(adapters[0], configs[0], folder, config)
    weights = [read_weights(folder) for folder in adapters]
    for folder, config, tensors in zip(adapters, configs, weights, strict=True):
        _check_tensors(adapters[0], weights[0], configs[0].members, folder, tensors, config.members)
    config, tensors = mixture_of(configs, weights)
    write_adapter(output, config, tensors, overwrite=overwrite)
    return config


def mixture_of(
    configs: Sequence[AdapterConfig], weights: Sequence[Mapping[str, Tensor]]
) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """The configuration and tensors of the mixture of adapters that agree (`combine`).

    The priors' standard deviations, which only training uses, become their geometric mean. How members' posteriors were
    fitted is not recorded.
    """
    stacked = [
        {name: tensor if config.members > 1 else tensor.unsqueeze(0) for name, tensor in tensors.items()}
        for config, tensors in zip(configs, weights, strict=True)
    ]
    merged = {name: torch.cat([tensors[name] for tensors in stacked]) for name in stacked[0]}
    priors = {config.prior_std for config in configs}
    prior_std = math.exp(sum(math.log(config.prior_std) for config in configs) / len(configs))
    fields = {
        "format_version": 2,
        "members": sum(config.members for config in configs),
        "prior_std": priors.pop() if len(priors) == 1 else prior_std,
        "posterior_scale": 1.0,
        "temperature": 1.0,
        "calibration": None,
        "novelty": None,
        "posterior_fit": None,
    }
    return configs[0].model_copy(update=fields), merged


def is_calibrated(config: AdapterConfig) -> bool:
    """Whether a combination leaves out something of an adapter: posterior scale, temperature, thresholds or novelty."""
    scaled = (config.posterior_scale, config.temperature) != (1.0, 1.0)
    return scaled or config.calibration is not None or config.novelty is not None


def _check_alike(first: Path, expected: AdapterConfig, folder: Path, config: AdapterConfig) -> None:
    before, now = (
        {name: getattr(one, name) for name in IN_COMMON} | {f"task.{name}": value for name, value in one.task}
        for one in (expected, config)
    )
    for one in (before, now):
        one["target_modules"] = sorted(one["target_modules"])
    for name, value in now.items():
        if value != before[name]:
            raise AdapterError(
                f"{folder} cannot be combined with {first}: its {name} is {_shown(value)} and that of the other is "
                f"{_shown(before[name])}"
            )


def _check_tensors(
    first: Path,
    expected: Mapping[str, Tensor],
    expected_members: int,
    folder: Path,
    tensors: Mapping[str, Tensor],
    members: int,
) -> None:
    if unlike := sorted(expected.keys() ^ tensors.keys()):
        where = folder if unlike[0] in expected else first
        raise AdapterError(f"tensor {unlike[0]!r} is missing from {where / WEIGHTS_FILE}, and the other adapter has it")
    for name, tensor in tensors.items():
        shape, wanted = list(tensor.shape), list(expected[name].shape)
        if shape[members > 1 :] != wanted[expected_members > 1 :] or (members > 1 and shape[0] != members):
            raise AdapterError(f"tensor {name!r} of {folder / WEIGHTS_FILE} has shape {shape}; that of {first} has {wanted}")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
