"""Import of a trained PEFT LoRA as the mean of a ScalaBL adapter. Writing LoRAs is in `peft_export`."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from scalabl.base.pretrained import output_head
from scalabl.config import AdapterConfig, Task
from scalabl.errors import AdapterError, OutputError
from scalabl.files.adapter_directory import CONFIG_FILE, WEIGHTS_FILE
from scalabl.files.output_folder import check_unused, write_adapter
from scalabl.files.peft_head import class_names, is_of_head, read_head, settings_of
from scalabl.model.scalabl_model import HEAD_WEIGHT, ScalaBLModel

KEY = re.compile(r"^base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight$")
# PEFT saves copies of the base model's embeddings and head with a LoRA of the head.
COPY = re.compile(r"^base_model\.model\.(?P<name>.+?)(\.base_layer)?\.(weight|bias)$")

# PEFT options that B diag(s) A cannot represent, each with the values that turn the option off; the first is the default.
UNSUPPORTED = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False, None),
    "use_bdlora": (None, False),
    "velora_config": (None,),
    "monteclora_config": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "megatron_config": (None,),
    # Other initialisations (pissa, olora, corda, loftq, …) change the base model's weights, so the LoRA needs those weights.
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}


@dataclass(frozen=True)
class Lora:
    """A trained LoRA.

    Attributes:
        modules: module name in the base model -> (A [r, d_in], B [d_out, r]), float64, with B multiplied by the scaling.
        copies: names of base modules of which PEFT saved a copy with the LoRA -> number of rows of the copied weight.
        head: the rows [C, D] of a head for sequence classification that was trained with the LoRA; None without one.
        labels: the names of the head's classes, if the folder has them.
    """

    base_model: str | None
    modules: dict[str, tuple[Tensor, Tensor]]
    copies: dict[str, int]
    head: Tensor | None = None
    labels: tuple[str, ...] | None = None

    @property
    def rank(self) -> int:
        """The largest rank over all modules."""
        return max(down.shape[0] for down, _ in self.modules.values())

    @property
    def sha256(self) -> str:
        """A hash of the names and values of all modules."""
        digest = hashlib.sha256()
        for name, pair in sorted(self.modules.items()):
            digest.update(f"{name} {[list(matrix.shape) for matrix in pair]}\n".encode())
            for matrix in pair:
                digest.update(matrix.contiguous().numpy().tobytes())
        return digest.hexdigest()


def is_peft(folder: Path) -> bool:
    """Whether a folder says that it is a PEFT adapter of some kind, and not one of this project."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False  # reading it as an adapter says what is wrong
    return isinstance(config, dict) and config.get("peft_type", "SCALABL") != "SCALABL"


def read_peft(folder: Path) -> Lora:
    """Read a LoRA directory saved by PEFT. Ranks and alphas may differ between modules and may be rank-stabilised.

    Raises:
        AdapterError: it is not a LoRA directory, or uses something other than a low-rank product, which the message names.
    """
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS_FILE)
    except FileNotFoundError as error:
        missing = error.filename or folder / WEIGHTS_FILE
        raise AdapterError(f"{missing} does not exist; a PEFT adapter has {CONFIG_FILE} and {WEIGHTS_FILE}") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterError(f"{folder} cannot be read as a PEFT adapter: {error}") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterError(f"{folder / CONFIG_FILE}: peft_type must be 'LORA'; other kinds of adapters cannot be converted")
    for field, harmless in UNSUPPORTED.items():
        if config.get(field, harmless[0]) not in harmless:
            raise AdapterError(
                f"{folder / CONFIG_FILE}: {field} is {config[field]!r}, which cannot be converted; only plain LoRA can"
            )
    head = read_head(folder, config, tensors)
    sides: dict[str, dict[str, Tensor]] = {}
    copies = {}
    for key, tensor in tensors.items():
        if head is not None and is_of_head(key):
            continue
        match = KEY.match(key)
        if match is None:
            copy = COPY.match(key)
            if copy is None or "lora_" in key:
                raise AdapterError(f"{folder / WEIGHTS_FILE}: tensor {key!r} is not the lora_A or lora_B of a linear layer")
            copies[copy["name"]] = tensor.shape[0]
            continue
        sides.setdefault(match["module"], {})[match["side"]] = tensor.double()
    modules = {}
    for module, pair in sides.items():
        if pair.keys() != {"A", "B"} or any(t.dim() != 2 for t in pair.values()) or pair["A"].shape[0] != pair["B"].shape[1]:
            raise AdapterError(
                f"{folder / WEIGHTS_FILE}: lora_A and lora_B of {module!r} must both be there, as matrices of the same rank"
            )
        if not all(bool(torch.isfinite(tensor).all()) for tensor in pair.values()):
            raise AdapterError(f"{folder / WEIGHTS_FILE}: {module!r} has values that are not finite")
        try:
            scaling = _scaling(config, module, pair["A"].shape[0])
        except (ValueError, TypeError, AttributeError, ZeroDivisionError, re.error):
            raise AdapterError(
                f"{folder / CONFIG_FILE}: lora_alpha must be a number, and alpha_pattern must map name patterns to numbers"
            ) from None
        modules[module] = (pair["A"], scaling * pair["B"])
    if not modules:
        raise AdapterError(f"{folder / WEIGHTS_FILE} has no lora_A and lora_B tensors")
    labels = None if head is None else class_names(settings_of(folder), len(head))
    return Lora(config.get("base_model_name_or_path"), modules, copies, head, labels)


def _scaling(config: dict[str, Any], module: str, rank: int) -> float:
    """A module's scaling: alpha / r, or alpha / sqrt r if rank-stabilised.

    As in PEFT, alpha is that of the first pattern in `alpha_pattern` with which the module's name ends, else `lora_alpha`.
    """
    patterns: dict[str, float] = config.get("alpha_pattern") or {}
    default = float(config.get("lora_alpha", 8))
    alpha = next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def subspace_of(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The thin SVD of B A as (A' [R, d_in], mu [R], B' [d_out, R]) with B' diag(mu) A' = B A.

    A' has orthonormal rows and mu has the singular values. If the product has a lower rank than R, the surplus entries of
    mu and columns of B' are zero, so the surplus scalars have no effect whatever is drawn for them.

    Args:
        down, up: A [r, d_in] and B [d_out, r], float64, r <= R.
    """
    left, left_core = torch.linalg.qr(up)
    right, right_core = torch.linalg.qr(down.T)
    u, singular, vh = torch.linalg.svd(left_core @ right_core.T, full_matrices=False)
    rank_of_product = int((singular > 1e-9 * singular[:1]).sum()) if float(singular[0]) > 0 else 0
    rows = down.new_zeros(rank, down.shape[1])
    columns = up.new_zeros(up.shape[0], rank)
    mean = singular.new_zeros(rank)
    rows[: len(singular)] = vh @ right.T
    columns[:, :rank_of_product] = (left @ u)[:, :rank_of_product]
    mean[:rank_of_product] = singular[:rank_of_product]
    return rows, mean, columns


def adapter_of(lora: Lora, skeleton: PreTrainedModel, task: Task, **fields: Any) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """The configuration and tensors of an adapter whose posterior mean is the LoRA; sigma is not among the tensors.

    Args:
        skeleton: of the base model (`pretrained.load_skeleton`); it is modified in place.
        task: `choice_tokens` must be set; of the LoRA of the head only their rows are used. With a head of the LoRA's own
            `task.head` must be 'own', and the choices are the names of its rows.
        fields: further fields of `AdapterConfig`.

    Raises:
        AdapterError: the LoRA does not fit the base model, or has no effect.
    """
    if lora.head is not None and task.head != "own":
        raise AdapterError(
            "the LoRA was trained with a head for sequence classification; start with --head fresh to keep it"
        )
    head_name, vocabulary = output_head(skeleton)
    for name, rows_saved in lora.copies.items():
        module = skeleton.get_submodule(name) if name in dict(skeleton.named_modules()) else None
        weight = getattr(module, "weight", None)
        if weight is None or weight.shape[0] != rows_saved:
            raise AdapterError(
                f"the LoRA was saved with a {name!r} of {rows_saved} rows, which is not the base model's size; "
                "use the base model on which it was trained"
            )
    # lora_alpha = r makes the scaling 1: PEFT's scaling, which may differ between modules, is already in B.
    config = AdapterConfig(
        r=lora.rank, lora_alpha=float(lora.rank), target_modules=_targets(lora.modules, skeleton), task=task, **fields
    )
    model = ScalaBLModel(skeleton, config)
    tensors: dict[str, Tensor] = {}
    if lora.head is not None:
        assert model.own_head is not None
        if lora.head.shape != model.own_head.weight.shape:
            raise AdapterError(
                f"the head 'score' of the LoRA is {list(lora.head.shape)}; the base model and {len(task.choices)} choices "
                f"need {list(model.own_head.weight.shape)}: name each class with --label, in the order of the rows"
            )
        tensors[HEAD_WEIGHT] = lora.head
    for name, (down, up) in lora.modules.items():
        layer = model.adapted[name]
        if name == head_name and up.shape[0] == vocabulary and task.choice_tokens is not None:
            up = up[torch.tensor(task.choice_tokens)]
        if (up.shape[0], down.shape[1]) != (layer.d_out, layer.d_in):
            raise AdapterError(
                f"the LoRA of {name!r} maps {down.shape[1]} to {up.shape[0]} features; "
                f"that layer of the base model maps {layer.d_in} to {layer.d_out}"
            )
        rows, mean, columns = subspace_of(down, up, config.r)
        tensors |= {f"{name}.lora_A": rows, f"{name}.s_mean": mean, f"{name}.lora_B": columns}
    if not any(bool(tensor.any()) for name, tensor in tensors.items() if name.endswith(".s_mean")):
        raise AdapterError("the LoRA has no effect: every product B A is zero; was it saved before training?")
    return config, {name: tensor.float() for name, tensor in tensors.items()}


def _targets(modules: Mapping[str, object], skeleton: PreTrainedModel) -> tuple[str, ...]:
    """`target_modules` for these modules: the last parts of their names if no other module ends in one, else full names."""
    absent = [name for name in modules if name not in dict(skeleton.named_modules())]
    if absent:
        raise AdapterError(f"the LoRA adapts {absent[0]!r}, which the base model {type(skeleton).__name__} does not have")
    short = tuple(dict.fromkeys(name.rpartition(".")[2] for name in modules))
    matched = {name for name, _ in skeleton.named_modules() if name.rpartition(".")[2] in short}
    return short if matched == set(modules) else tuple(modules)


def relative_log_std(mean: Tensor, share: Tensor | float) -> Tensor:
    """ln sigma [R] for sigma = share * mu. Where mu is 0 sigma has no effect; it is set as for the smallest mu above 0."""
    present = mean[mean > 0]
    smallest = present.min() if len(present) else mean.new_ones(())
    return (share * torch.where(mean > 0, mean, smallest)).log()


def with_relative_sigma(tensors: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """The tensors of `adapter_of` with a sigma for each mean: a share of it."""
    means = {name: tensor for name, tensor in tensors.items() if name.endswith(".s_mean")}
    sigmas = {name.replace(".s_mean", ".s_log_std"): relative_log_std(mean, share) for name, mean in means.items()}
    return {**tensors, **sigmas}


def convert_peft(
    folder: Path,
    output: Path,
    skeleton: PreTrainedModel,
    *,
    base_model: str,
    task: Task,
    relative_std: float,
    overwrite: bool = False,
) -> AdapterConfig:
    """Convert a trained PEFT LoRA to an adapter directory: the LoRA is the posterior mean, and sigma a share of each mu.

    Args:
        relative_std: sigma / mu.
        overwrite: replace an adapter in `output`.

    Raises:
        AdapterError: see `read_peft` and `adapter_of`.
        OutputError: `output` is not empty and `overwrite` is false, or `output` is `folder`.
    """
    if output.resolve() == folder.resolve():
        raise OutputError(f"{output} is the LoRA that is read; choose another --output")
    check_unused(output, overwrite=overwrite)
    config, weights = adapter_of(read_peft(folder), skeleton, task, base_model_name_or_path=base_model)
    write_adapter(output, config, with_relative_sigma(weights, relative_std), overwrite=overwrite)
    return config
