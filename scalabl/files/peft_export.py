"""Export of posterior samples as PEFT LoRA directories. Importing such directories is in `peft_import`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from scalabl.base.pretrained import output_head
from scalabl.config import AdapterConfig, Task
from scalabl.errors import AdapterError
from scalabl.files.adapter_directory import CONFIG_FILE, WEIGHTS_FILE, load_weights, read_config, read_weights
from scalabl.files.atomic import new_folder
from scalabl.model.posterior import DEFAULT_SCHEME, FACTOR, Draws, Posterior, Scheme
from scalabl.model.scalabl_model import ScalaBLModel

EXPORT_FILE = "scalabl_export.json"

HOW_TO_READ = (
    "Each folder is an ordinary LoRA: one sample of the posterior. For each, take the logits at the last position of the "
    "prompt over task.choice_tokens, divide them by the temperature and take the softmax; the predictive is the mean over "
    "the folders. The head is adapted over the choice tokens only: its lora_B has zero rows for every other token."
)


def export_peft(
    adapter: Path, output: Path, base: PreTrainedModel, *, num_samples: int, seed: int = 0, scheme: Scheme = DEFAULT_SCHEME
) -> list[str]:
    """Write K posterior samples as K LoRA folders, A_k = diag(s_k) A, and a file that explains them (`EXPORT_FILE`).

    Args:
        output: must not exist; it is created complete or not at all.
        base: the base model or a skeleton of it (`pretrained.load_skeleton`); it is modified in place.

    Returns:
        The names of the folders in `output`.

    Raises:
        AdapterError: the adapter is malformed or does not fit the base model, or `output` exists.
    """
    if output.exists():
        raise AdapterError(f"{output} already exists; choose a new folder for the export")
    samples = LoraSamples.read(adapter, base, num_samples=num_samples, seed=seed, scheme=scheme)
    config = samples.config
    names = [f"sample-{index:0{len(str(num_samples - 1))}d}" for index in range(num_samples)]
    with new_folder(output) as root:
        for index, name in enumerate(names):
            write_lora(root / name, samples.tensors(index), samples.settings)
        note = {
            "how_to_read": HOW_TO_READ,
            "samples": names,
            "seed": seed,
            "draw_scheme": scheme,
            "posterior_scale": config.posterior_scale,
            "temperature": config.temperature,
            "base_model_name_or_path": config.base_model_name_or_path,
            "task": config.task.model_dump(mode="json"),
        }
        _write_json(root / EXPORT_FILE, note)
    return names


@dataclass(frozen=True)
class LoraSamples:
    """K posterior samples of an adapter, each of which becomes one LoRA.

    Attributes:
        scalars: [K, P], s of each sample.
        modules: names of the adapted modules, in the order in which the scalars are split over them.
        settings: the content of each LoRA's `adapter_config.json`.
        vocabulary: the number of rows of the base model's head.
    """

    config: AdapterConfig
    weights: Mapping[str, Tensor]
    draws: Draws
    scalars: Tensor
    modules: tuple[str, ...]
    settings: Mapping[str, Any]
    head_name: str
    vocabulary: int

    @classmethod
    def read(cls, adapter: Path, base: PreTrainedModel, *, num_samples: int, seed: int, scheme: Scheme) -> LoraSamples:
        """Read an adapter for a base model or a skeleton of it, which is modified in place.

        Raises:
            AdapterError: the adapter is malformed or does not fit, or has more scalars than the draw scheme supports.
        """
        config = read_config(adapter)
        if config.task.head == "own":
            raise AdapterError(
                f"{adapter} has a head of its own (task.head is 'own'), which a LoRA for text generation cannot carry; "
                "serve it with --engine transformers"
            )
        head_name, vocabulary = output_head(base)
        transposed = any(isinstance(module, Conv1D) for module in base.modules())
        model = ScalaBLModel(base, config)
        weights = read_weights(adapter)
        load_weights(model, weights)
        modules = tuple(model.adapted)
        try:
            draws = model.draws(num_samples, seed, scheme)
        except ValueError as error:
            raise AdapterError(str(error)) from None
        settings = _lora_config(model.config, list(modules), fan_in_fan_out=transposed)
        scalars = _posterior(model.config, weights, modules).sample(draws.epsilon, draws.member)
        return cls(model.config, weights, draws, scalars, modules, settings, head_name, vocabulary)

    @property
    def posterior(self) -> Posterior:
        """q(s) of the adapter."""
        return _posterior(self.config, self.weights, self.modules)

    def has_effect(self, module: str) -> bool:
        """Whether the first sample changes a module: its B is not zero."""
        up = self.weights[f"{module}.lora_B"]
        return bool((up if self.config.members == 1 else up[0]).any())

    def tensors(self, index: int) -> dict[str, Tensor]:
        """The tensors of one sample's LoRA: A_k = diag(s_k) A and B, where the head's B has a row for every token."""
        tensors = {}
        member = int(self.draws.member[index])
        parts = torch.split(self.scalars[index], self.config.r)
        for module, s in zip(self.modules, parts, strict=True):
            down, up = (self.weights[f"{module}.{kind}"] for kind in ("lora_A", "lora_B"))
            if self.config.members > 1:
                down, up = down[member], up[member]
            if module == self.head_name:
                up = _all_tokens(up, self.config.task, self.vocabulary)
            tensors[f"base_model.model.{module}.lora_A.weight"] = s.unsqueeze(1) * down
            tensors[f"base_model.model.{module}.lora_B.weight"] = up.contiguous()
        return tensors


def _posterior(config: AdapterConfig, weights: Mapping[str, Tensor], modules: Sequence[str]) -> Posterior:
    mean, log_std = (
        torch.cat([weights[f"{module}.{kind}"].view(config.members, -1) for module in modules], dim=1)
        for kind in ("s_mean", "s_log_std")
    )
    factor = weights[FACTOR].view(*mean.shape, -1) if config.covariance == "full" else None
    return Posterior(mean, log_std, config.posterior_scale, factor)


def write_lora(folder: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Write one LoRA directory; `folder` may exist if it is empty."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS_FILE).write_bytes(save(dict(tensors), metadata={"format": "pt"}))
    _write_json(folder / CONFIG_FILE, settings)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _all_tokens(rows: Tensor, task: Task, vocabulary: int) -> Tensor:
    """The head's lora_B with a row for every token: [C, R] -> [V, R], zero except for the choice tokens."""
    assert task.choice_tokens is not None
    return rows.new_zeros(vocabulary, rows.shape[1]).index_copy_(0, torch.tensor(task.choice_tokens), rows)


def _lora_config(config: AdapterConfig, modules: list[str], *, fan_in_fan_out: bool) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base_model_name_or_path,
        "r": config.r,
        "lora_alpha": int(config.lora_alpha) if config.lora_alpha.is_integer() else config.lora_alpha,
        # All names in full if only some layers are adapted: PEFT's layers_to_transform would leave out the head too.
        "target_modules": list(config.target_modules) if config.layers_to_transform is None else modules,
        "fan_in_fan_out": fan_in_fan_out,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "inference_mode": True,
    }
