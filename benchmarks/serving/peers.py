"""What one would do otherwise: a loop over posterior samples as the published code has it, and K LoRAs in one PEFT batch.

vLLM is in `vllm_peer`, our own methods in `features`.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from scalabl.base.pretrained import load_pretrained, load_skeleton
from scalabl.files.peft_export import export_peft
from scalabl.prompt import Prompter


class Peers:
    """K posterior samples as K LoRAs over a base model of their own, by Hugging Face's PEFT.

    Prompts are padded on the left, so that every answer stands last. All methods give [B, K, C].
    """

    def __init__(self, adapter: Path, model: str, prompter: Prompter, num_samples: int) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from peft import PeftModel
            from peft.tuners.tuners_utils import BaseTunerLayer

            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch) / "samples"
                self.names = export_peft(adapter, folder, load_skeleton(model)[0], num_samples=num_samples)
                base = load_pretrained(model).model
                self.model = PeftModel.from_pretrained(base, str(folder / self.names[0]), adapter_name=self.names[0])
                for name in self.names[1:]:
                    self.model.load_adapter(str(folder / name), adapter_name=name)
        self.model.eval()
        self._adapted = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]
        assert prompter.choice_tokens is not None
        self._tokens = list(prompter.choice_tokens)

    @torch.inference_mode()
    def loop(self, sequences: Sequence[Sequence[int]], num_samples: int, *, last_only: bool = False) -> Tensor:
        """K passes of one sample each over B padded rows.

        Args:
            last_only: multiply out the vocabulary at the last position only, which the published code does not do.
        """
        ids, mask = _left_padded(sequences)
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
        ids, mask = (tensor.repeat_interleave(num_samples, dim=0) for tensor in _left_padded(sequences))
        names = self.names[:num_samples] * len(sequences)
        output = self.model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=1, adapter_names=names)
        logits: Tensor = output.logits[:, -1, self._tokens]
        return logits.unflatten(0, (len(sequences), num_samples))


def _left_padded(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, sequences))
    ids, mask = (torch.zeros(len(sequences), width, dtype=torch.int64) for _ in range(2))
    for row, sequence in enumerate(sequences):
        ids[row, width - len(sequence) :] = torch.tensor(sequence)
        mask[row, width - len(sequence) :] = 1
    return ids, mask
