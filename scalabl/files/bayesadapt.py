"""Conversion of the authors' BayesAdapt checkpoints to adapter directories. PEFT LoRAs are converted in `peft_import`.

The `.pt` files are read with `weights_only`, so that no code in them can run.
"""

from __future__ import annotations

import math
import pickle
import re
from pathlib import Path

import torch
from torch import Tensor

from scalabl.config import AdapterConfig, Task
from scalabl.errors import AdapterError
from scalabl.files.output_folder import check_unused, write_adapter

# BayesAdapt wraps PEFT: base_model.model.<module>.lora_A.default.<name>, base_model.model.<module>.lora_B.default.weight
KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.default\.(?P<name>\w+)$")
NEEDED = ("A.Vh", "A.log_s", "A.log_s_sigma", "B.weight")


def convert_bayesadapt(
    checkpoint: Path, output: Path, *, base_model: str, lora_alpha: float, task: Task, overwrite: bool = False
) -> AdapterConfig:
    """Convert a ScalaBL `state_dict.pt` of the authors' code to an adapter directory.

    In such a checkpoint s ~ N(exp(log_s), exp(log_s_sigma)^2), A = Vh, and each scalar has a prior of its own. Only the
    geometric mean of the priors' standard deviations is saved, as `prior_std`: the prior is not used after training.

    Args:
        task: `choice_tokens` must be set; the head's lora_B has one row per choice token, in that order.
        overwrite: replace an adapter in `output`.

    Raises:
        AdapterError: the file is not such a checkpoint; the message names a missing key.
        OutputError: `output` is not empty and `overwrite` is false.
    """
    check_unused(output, overwrite=overwrite)
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise AdapterError(f"{checkpoint} does not exist") from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise AdapterError(f"{checkpoint} is not a PyTorch state dict of tensors ({type(error).__name__})") from None
    if not isinstance(state, dict):
        raise AdapterError(f"{checkpoint} contains a {type(state).__name__}, not a state dict")
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = KEY.match(str(key))
        if match:
            modules.setdefault(match["module"], {})[f"{match['side']}.{match['name']}"] = tensor
    if not modules:
        raise AdapterError(
            f"{checkpoint} has no key like base_model.model.<module>.lora_A.default.log_s; it is not a BayesAdapt checkpoint"
        )

    weights: dict[str, Tensor] = {}
    prior_log_std = []
    for module, parts in modules.items():
        missing = [name for name in NEEDED if name not in parts]
        if missing:
            raise AdapterError(f"{checkpoint}: {module} has no tensor lora_{missing[0].replace('.', '.default.')}")
        weights |= {
            f"{module}.lora_A": parts["A.Vh"],
            f"{module}.lora_B": parts["B.weight"],
            f"{module}.s_mean": parts["A.log_s"].exp(),
            f"{module}.s_log_std": parts["A.log_s_sigma"],
        }
        if "A.log_p_sigma" in parts:
            prior_log_std.append(parts["A.log_p_sigma"].flatten())
    ranks = {tensor.shape[0] for name, tensor in weights.items() if name.endswith(".s_mean")}
    if len(ranks) != 1:
        raise AdapterError(f"{checkpoint}: the modules have different ranks {sorted(ranks)}; all must have the same")
    layers = {int(match[1]) for module in modules if (match := re.search(r"\.(\d+)\.", module))}
    complete = layers == set(range(max(layers) + 1)) if layers else True
    config = AdapterConfig(
        base_model_name_or_path=base_model,
        r=ranks.pop(),
        lora_alpha=lora_alpha,
        target_modules=tuple(dict.fromkeys(module.rpartition(".")[2] for module in modules)),
        layers_to_transform=None if complete else tuple(sorted(layers)),
        prior_std=math.exp(float(torch.cat(prior_log_std).mean())) if prior_log_std else 1.0,
        task=task,
    )
    write_adapter(output, config, weights, overwrite=overwrite)
    return config
