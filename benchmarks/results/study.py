"""What every run of the study shares: the base model, the data sets as prompts, and the trunk's states of each.

Which trainings there are is in `plan`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.results.plan import Run
from benchmarks.results.saved import CODE
from scalabl.base.pretrained import Pretrained, load_pretrained
from scalabl.config import AdapterConfig, Task
from scalabl.evaluation.calibration import split_halves
from scalabl.evaluation.dataset import read_examples
from scalabl.evaluation.encoded import EncodedSet, encode_examples
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.passes.probes import find_shared_work
from scalabl.passes.trunk_cache import TrunkCache, trunk_cache
from scalabl.prompt import Prompter
from scalabl.training.run_folder import Rows, fingerprint_of

TEMPLATE = "{input}\nTopic:"
RANK, ALPHA = 8, 16.0
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
ADAPTED_LAYERS = 4  # the last of the base model: the study's runs, and every sample, begin at their input
FEW = 300
NUM_SAMPLES = 16

SETS = ("train", "few", "validation", "test", "ood", "ood_validation")


def subset(encoded: EncodedSet, rows: torch.Tensor) -> EncodedSet:
    """Some rows of a set."""
    return EncodedSet(
        [encoded.sequences[i] for i in rows.tolist()], encoded.answers[rows], encoded.num_choices[rows], encoded.name
    )


@dataclass
class Study:
    """The base model and the sets; `folder` has what runs have finished, so that a study that was cut short goes on."""

    pretrained: Pretrained
    config: AdapterConfig
    sets: dict[str, EncodedSet]
    folder: Path

    @classmethod
    def of(cls, base: str, data: Path, folder: Path) -> Study:
        """Reads `clinc10` and `clinc_oos` below `data`."""
        pretrained = load_pretrained(base, device="cpu", dtype="float32")
        inside, outside = data / "clinc10", data / "clinc_oos"
        train = read_examples(inside / "train.jsonl")
        prompter = Prompter(Task(kind="classification", template=TEMPLATE, choices=train[0].choices), pretrained.tokenizer)
        layers = pretrained.model.config.num_hidden_layers
        config = AdapterConfig(
            base_model_name_or_path="HuggingFaceTB/SmolLM2-135M-Instruct",
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=TARGETS,
            layers_to_transform=tuple(range(layers - ADAPTED_LAYERS, layers)),
            task=prompter.resolved_task,
        )
        sets = {
            "train": encode_examples(prompter, train),
            "validation": encode_examples(prompter, read_examples(inside / "validation.jsonl")),
            "test": encode_examples(prompter, read_examples(inside / "test.jsonl")),
            "ood": encode_examples(prompter, read_examples(outside / "test.jsonl", labelled=False)),
            "ood_validation": encode_examples(prompter, read_examples(outside / "validation.jsonl", labelled=False)),
        }
        order = np.random.default_rng(0).permutation(len(train))[:FEW]
        sets["few"] = subset(sets["train"], torch.from_numpy(np.sort(order)))
        folder.mkdir(parents=True, exist_ok=True)
        return cls(pretrained, config, sets, folder)

    def model(self, **changes: object) -> ScalaBLModel:
        """A model with an adapter that is not trained."""
        model = ScalaBLModel(self.pretrained.model, self.config.model_copy(update=changes))
        model.reset_adapter(0)
        find_shared_work(model)
        return model.eval()

    @functools.cached_property
    def _shared(self) -> dict[str, Any]:
        fields = {"r", "lora_alpha", "target_modules", "layers_to_transform", "task"}
        return {
            "code": CODE,
            "num_samples": NUM_SAMPLES,
            "adapter": self.config.model_dump(mode="json", include=fields),
            "base_model": fingerprint_of(self.pretrained.model),
            "sets": {name: Rows.of(encoded).model_dump(exclude={"file"}) for name, encoded in self.sets.items()},
        }

    def made_from(self, run: Run | None = None, **more: Any) -> dict[str, Any]:
        """What a run is made from: its plan, and what all runs share.

        Args:
            run: None for what no single training decides.
            more: what else decides the result.
        """
        return {**self._shared, **({} if run is None else run.plan), **more}

    @functools.cached_property
    def caches(self) -> dict[str, TrunkCache]:
        """The trunk's states of every set."""
        model = self.model()
        try:
            caches = {name: trunk_cache(model, encoded.sequences, 4.0) for name, encoded in self.sets.items()}
        finally:
            model.detach()
        return {name: cache for name, cache in caches.items() if cache is not None}

    @functools.cached_property
    def fit_rows(self) -> torch.Tensor:
        """The half of the validation rows that scale and temperature are fitted on; the other gives thresholds."""
        return split_halves(self.sets["validation"].answers, 0)[0]

    @functools.cached_property
    def threshold_rows(self) -> torch.Tensor:
        """The other half."""
        return split_halves(self.sets["validation"].answers, 0)[1]
