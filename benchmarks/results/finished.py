"""The study's plain LoRAs as PEFT leaves them: folders for `scalabl fit`, with the logits of their own single pass.

What `scalabl fit` makes of them is measured in `fitted`.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from peft import get_peft_model_state_dict
from torch import Tensor

from benchmarks.results.lora import Lora, fit, lora
from benchmarks.results.plan import Run
from benchmarks.results.saved import read_logits, save_logits
from benchmarks.results.study import ALPHA, FEW, RANK, Study
from scalabl.base.pretrained import output_head
from scalabl.files.peft_export import write_lora

LOGITS = "logits.safetensors"
SETS = ("validation", "test", "ood")


def train(study: Study, run: Run) -> Path:
    """Train a plain LoRA, unless it is there: its PEFT folder. Beside it are its logits (`own_logits`)."""
    folder = study.folder / run.name
    made_from = study.made_from(run)
    if (folder / LOGITS).is_file():
        read_logits(folder / LOGITS, made_from)  # refuses those of another run
        return folder / "peft"
    _, vocabulary = output_head(study.pretrained.model)
    with lora(study, 0.0, run.seed) as peer:
        fit(peer, run.rows, run.training)
        write_lora(folder / "peft", _tensors(peer, vocabulary), _settings(peer))
        logits = {name: peer.logits_of(name) for name in SETS}
    save_logits(folder / LOGITS, logits, made_from)
    return folder / "peft"


def own_logits(study: Study, run: Run) -> dict[str, Tensor]:
    """Logits [N, 1, C] of each set, by the LoRA as it was trained."""
    return read_logits(study.folder / run.name / LOGITS, study.made_from(run))


def training_rows(study: Study, data: Path, rows: str) -> Path:
    """The file with the rows that a LoRA was trained on."""
    source = data / "clinc10" / "train.jsonl"
    if rows == "train":
        return source
    lines = source.read_bytes().splitlines(keepends=True)
    chosen = np.sort(np.random.default_rng(0).permutation(len(lines))[:FEW])  # as in `Study.of`
    path = study.folder / "few.jsonl"
    path.write_bytes(b"".join(lines[index] for index in chosen))
    return path


def _tensors(peer: Lora, vocabulary: int) -> dict[str, Tensor]:
    """The LoRA's tensors by the base model's own names; the head's B has a row for every token, zero but for choices."""
    tensors = {}
    for name, tensor in get_peft_model_state_dict(peer.model).items():
        if ".lora_" not in name:
            continue  # a copy of the base model's head
        value = tensor.detach().clone()
        if name.endswith("lm_head.inner.lora_B.weight"):
            tokens = torch.tensor(peer.study.config.task.choice_tokens)
            value = value.new_zeros(vocabulary, value.shape[1]).index_copy_(0, tokens, value)
        tensors[name.replace("lm_head.inner", "lm_head")] = value.contiguous()
    return tensors


def _settings(peer: Lora) -> dict[str, object]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": peer.study.config.base_model_name_or_path,
        "r": RANK,
        "lora_alpha": int(ALPHA),
        "target_modules": list(peer.study.config.target_modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
