"""What one would do otherwise: a loop over posterior samples as the published code has it, and K LoRAs in one PEFT batch.

vLLM is in `vllm_peer`, our own methods in `features`.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from scalabl.base.pretrained import load_pretrained, load_skeleton
from scalabl.files.peft_export import export_peft
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.prompt import Prompter


class Peers:
    """K posterior samples as K LoRAs over a base model of their own, by Hugging Face's PEFT.

    Prompts are padded on the left, so that every answer stands last. All methods give [B, K, C].
    """

    def __init__(self, model: Any, names: Sequence[str], choice_tokens: Sequence[int]) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.model, self.names, self._tokens = model.eval(), list(names), list(choice_tokens)
        self._adapted = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]

    @classmethod
    def of_folder(cls, adapter: Path, model: str, prompter: Prompter, num_samples: int) -> Peers:
        """The samples of an adapter in a folder, as `scalabl export` writes them."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from peft import PeftModel

            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch) / "samples"
                names = export_peft(adapter, folder, load_skeleton(model)[0], num_samples=num_samples)
                base = load_pretrained(model).model
                peft = PeftModel.from_pretrained(base, str(folder / names[0]), adapter_name=names[0])
                for name in names[1:]:
                    peft.load_adapter(str(folder / name), adapter_name=name)
        assert prompter.choice_tokens is not None
        return cls(peft, names, prompter.choice_tokens)

    @classmethod
    @torch.no_grad()
    def of_model(cls, model: ScalaBLModel, base: PreTrainedModel, num_samples: int) -> Peers:
        """The samples of an adapter in memory, whose modules are linear layers of the blocks.

        Args:
            base: a copy of the model's base model, which PEFT changes in place. The LoRAs have its dtype.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from peft import LoraConfig, PeftModel

            names = [f"sample-{index}" for index in range(num_samples)]
            settings: dict[str, Any] = {"r": model.config.r, "lora_alpha": model.config.lora_alpha}
            settings |= {"target_modules": list(model.adapted), "lora_dropout": 0.0, "init_lora_weights": False}
            peft = PeftModel(base, LoraConfig(**settings), adapter_name=names[0], autocast_adapter_dtype=False)
            for name in names[1:]:
                peft.add_adapter(name, LoraConfig(**settings), autocast_adapter_dtype=False)
        samples = torch.split(model.sample(model.draws(num_samples).epsilon), model.config.r, dim=1)
        for (path, layer), s in zip(model.adapted.items(), samples, strict=True):
            lora = peft.base_model.model.get_submodule(path)
            for index, name in enumerate(names):
                lora.lora_A[name].weight.copy_(s[index].unsqueeze(1) * layer.lora_A)
                lora.lora_B[name].weight.copy_(layer.lora_B)
        peft.to(base.dtype)
        assert model.config.task.choice_tokens is not None
        return cls(peft, names, model.config.task.choice_tokens)

    @torch.inference_mode()
    def loop(self, sequences: Sequence[Sequence[int]], num_samples: int, *, last_only: bool = False) -> Tensor:
        """K passes of one sample each over B padded rows.

        Args:
            last_only: multiply out the vocabulary at the last position only, which the published code does not do.
        """
        ids, mask = _left_padded(sequences, self.model.device)
        logits_by_sample = []
        for name in self.names[:num_samples]:
            self._take(name)
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=int(last_only)).logits
            logits_by_sample.append(logits[:, -1, self._tokens])
        return torch.stack(logits_by_sample, dim=1)

    def _take(self, name: str) -> None:
        """As `set_adapter`, which besides visits every adapter that is loaded: the published code has one."""
        for layer in self._adapted:
            layer._active_adapter = name

    @torch.inference_mode()
    def mixed_batch(self, sequences: Sequence[Sequence[int]], num_samples: int) -> Tensor:
        """One pass over B * K padded rows, each with the LoRA that it names; the vocabulary at the last position only."""
        device = self.model.device
        ids, mask = (tensor.repeat_interleave(num_samples, dim=0) for tensor in _left_padded(sequences, device))
        names = self.names[:num_samples] * len(sequences)
        output = self.model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1, adapter_names=names)
        logits: Tensor = output.logits[:, -1, self._tokens]
        return logits.unflatten(0, (len(sequences), num_samples))


def _left_padded(sequences: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, sequences))
    ids, mask = (torch.zeros(len(sequences), width, dtype=torch.int64) for _ in range(2))
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = torch.tensor(sequence)
        mask[row, width - len(sequence) :] = 1
    return ids.to(device), mask.to(device)
