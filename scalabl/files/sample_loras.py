"""Posterior samples as LoRA folders with unique names, for an engine that is given a LoRA's name only (vLLM).

A name contains a fingerprint of everything that determines the LoRA (weights, draws, the base model's shape), so that an
engine never uses an outdated or a wrong LoRA under it. Besides the K samples there is one LoRA for each kind of module,
called a *part*: sample 0 reduced to the modules of that kind. Parts show whether an engine ignores a kind of module (a tied
head, say): it then answers that part like the base model. What a LoRA folder contains is decided in `peft_export`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from transformers import PreTrainedModel

from scalabl.errors import AdapterError
from scalabl.files.adapter_directory import CONFIG_FILE, WEIGHTS_FILE
from scalabl.files.atomic import new_folder
from scalabl.files.peft_export import LoraSamples, write_lora
from scalabl.model.posterior import Scheme

FORMAT = 1  # version of what the fingerprint covers


@dataclass(frozen=True)
class SampleLoras:
    """The LoRAs of an adapter, by name.

    Attributes:
        names: names of the samples, in the order of the draws; the first j do not depend on K.
        parts: name of a part -> the kind of module that it contains.
    """

    loras: LoraSamples
    names: tuple[str, ...]
    parts: Mapping[str, str]

    @classmethod
    def read(cls, adapter: Path, base: PreTrainedModel, *, num_samples: int, seed: int, scheme: Scheme) -> SampleLoras:
        """Read the LoRAs of an adapter directory, without writing any.

        Args:
            base: as for `LoraSamples.read`; it is modified in place.

        Raises:
            AdapterError: the adapter is malformed or does not fit the base model.
        """
        loras = LoraSamples.read(adapter, base, num_samples=num_samples, seed=seed, scheme=scheme)
        stem = f"scalabl-{_fingerprint(loras, adapter)}"
        kinds = dict.fromkeys(module.rpartition(".")[2] for module in loras.modules if loras.has_effect(module))
        names = tuple(f"{stem}-{index}" for index in range(num_samples))
        return cls(loras, names, {f"{stem}-only-{kind}": kind for kind in kinds})

    @property
    def all_names(self) -> tuple[str, ...]:
        """The names that an engine must have: samples and parts."""
        return (*self.names, *self.parts)

    def write(self, root: Path, name: str) -> Path:
        """The folder of one LoRA below `root`. It is written if it does not exist, completely or not at all.

        Raises:
            AdapterError: a folder of that name holds something else: half a copy, say, or a LoRA that was changed.
        """
        folder = root / name
        if folder.is_dir() and any(folder.iterdir()):
            if (fault := self._fault(folder, name)) is not None:
                raise AdapterError(f"{folder} is not the LoRA of that name: {fault}; remove that folder")
            return folder
        # If another process is faster, its folder is kept: the content is the same.
        with new_folder(folder, keep_existing=True) as draft:
            write_lora(draft, self._tensors(name), self.loras.settings)
        return folder

    def _fault(self, folder: Path, name: str) -> str | None:
        """What is wrong with a folder that has the name of a LoRA. None if it holds that LoRA, up to rounding."""
        expected = self._tensors(name)
        try:
            settings = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
            tensors = load((folder / WEIGHTS_FILE).read_bytes())
        except FileNotFoundError as error:
            return f"it has no {Path(error.filename).name}"
        except (OSError, ValueError, SafetensorError) as error:
            return f"it cannot be read ({error})"
        if not isinstance(settings, dict) or _compared(settings) != _compared(self.loras.settings):
            return f"its {CONFIG_FILE} differs"
        if tensors.keys() != expected.keys() or not all(_close(tensors[key], expected[key]) for key in expected):
            return f"its {WEIGHTS_FILE} has other tensors"
        return None

    def _tensors(self, name: str) -> dict[str, Tensor]:
        kind = self.parts.get(name)
        if kind is None:
            return self.loras.tensors(self.names.index(name))
        return {key: value for key, value in self.loras.tensors(0).items() if f".{kind}.lora_" in key}


def _compared(settings: Mapping[str, Any]) -> dict[str, Any]:
    # The base model's name is a note: a model may be renamed, and its name is not a part of the fingerprint.
    return {key: value for key, value in settings.items() if key != "base_model_name_or_path"}


def _close(tensor: Tensor, expected: Tensor) -> bool:
    return tensor.shape == expected.shape and torch.allclose(tensor.float(), expected, rtol=1e-4, atol=1e-6)


def _fingerprint(loras: LoraSamples, adapter: Path) -> str:
    config = loras.config
    covered: dict[str, Any] = {
        "format": FORMAT,
        "weights": hashlib.sha256((adapter / WEIGHTS_FILE).read_bytes()).hexdigest(),
        "modules": loras.modules,
        "vocabulary": loras.vocabulary,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "posterior_scale": config.posterior_scale,
        "choice_tokens": config.task.choice_tokens,
        "seed": loras.draws.seed,
        "scheme": loras.draws.scheme,
    }
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()[:16]
