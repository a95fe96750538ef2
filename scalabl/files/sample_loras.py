"""Posterior samples as LoRA folders for an engine that knows them by name alone: names that say what is inside.

A name holds a fingerprint of everything that the LoRA was made of (weights, draws, base model's shape), so that a stale or
a wrong one is never taken for it. Beside the K samples there is one LoRA for each kind of module, the *parts*: sample 0 cut
down to the modules of this kind. An engine that leaves out a kind (a tied head, say) answers a part as if it were not there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from scalabl.files.adapter_directory import WEIGHTS_FILE
from scalabl.files.atomic import new_folder
from scalabl.files.peft_export import LoraSamples, write_lora
from scalabl.model.posterior import Scheme

FORMAT = 1  # of what a fingerprint covers


@dataclass(frozen=True)
class SampleLoras:
    """The LoRAs of an adapter, by name.

    Attributes:
        names: of the samples, in the order of the draws; the first j do not depend on K.
        parts: name -> the kind of module that it has.
    """

    loras: LoraSamples
    names: tuple[str, ...]
    parts: Mapping[str, str]

    @classmethod
    def read(cls, adapter: Path, base: PreTrainedModel, *, num_samples: int, seed: int, scheme: Scheme) -> SampleLoras:
        """The LoRAs of an adapter directory, none of them written yet.

        Args:
            base: as for `LoraSamples.read`.

        Raises:
            AdapterError: the adapter is malformed or does not fit the base model.
        """
        loras = LoraSamples.read(adapter, base, num_samples=num_samples, seed=seed, scheme=scheme)
        stem = f"scalabl-{_fingerprint(loras, adapter)}"
        kinds = dict.fromkeys(
            module.rpartition(".")[2] for module in loras.modules if bool(loras.weights[f"{module}.lora_B"].any())
        )
        names = tuple(f"{stem}-{index}" for index in range(num_samples))
        return cls(loras, names, {f"{stem}-only-{kind}": kind for kind in kinds})

    @property
    def all_names(self) -> tuple[str, ...]:
        """What an engine must have: samples and parts."""
        return (*self.names, *self.parts)

    def write(self, root: Path, name: str) -> Path:
        """The folder of one LoRA below `root`, written unless it is there; it appears whole or not at all."""
        folder = root / name
        if folder.is_dir():
            return folder
        # Another process may be faster: it writes the same content.
        with new_folder(folder, keep_existing=True) as draft:
            write_lora(draft, self._tensors(name), self.loras.settings)
        return folder

    def _tensors(self, name: str) -> dict[str, Tensor]:
        kind = self.parts.get(name)
        if kind is None:
            return self.loras.tensors(self.names.index(name))
        return {key: value for key, value in self.loras.tensors(0).items() if f".{kind}.lora_" in key}


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
