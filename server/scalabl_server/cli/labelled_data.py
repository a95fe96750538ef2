"""What `evaluate` and `calibrate` share: their options, an adapter loaded on its base model, and the module that draws."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer

from scalabl.config import Quantization
from scalabl.errors import ScalaBLError

if TYPE_CHECKING:
    from scalabl.evaluation.dataset import Example
    from scalabl.evaluation.encoded import EncodedSet
    from scalabl.model.scalabl_model import ScalaBLModel
    from scalabl.prompt import Prompter

Adapter = Annotated[Path, typer.Option(help="The adapter directory.")]
Model = Annotated[str | None, typer.Option(help="Base model (default: the one that the adapter names).")]
NumSamples = Annotated[int, typer.Option(min=1, help="K, posterior samples per input.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the draws.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, … (auto: a GPU when there is one).")]
Precision = Annotated[Quantization | None, typer.Option(help="Linear layers in lower precision, as in serve.")]


@dataclass(frozen=True)
class Loaded:
    """An adapter on its base model, with its prompts."""

    model: ScalaBLModel
    prompter: Prompter
    max_tokens: int

    def encode(self, rows: list[Example]) -> EncodedSet:
        """The rows as token ids."""
        from scalabl.evaluation.encoded import encode_examples

        return encode_examples(self.prompter, rows, self.max_tokens)


def load(adapter: Path, model: str | None, device: str, quantization: Quantization | None) -> Loaded:
    """The adapter of a folder on the base model that it names, or on another."""
    from scalabl.base.pretrained import load_pretrained
    from scalabl.files.adapter_directory import load_adapter, read_config
    from scalabl.prompt import Prompter

    config = read_config(adapter)
    pretrained = load_pretrained(model or config.base_model_name_or_path, device=device, quantization=quantization)
    prompter = Prompter(config.task, pretrained.tokenizer)
    return Loaded(load_adapter(pretrained.model, adapter), prompter, pretrained.max_tokens)


def plots_module() -> ModuleType:
    """The module that draws, asked for before the long work."""
    try:
        from scalabl.evaluation import plots
    except ModuleNotFoundError:
        raise ScalaBLError("plots need matplotlib; install it with: pip install 'scalabl[plots]'") from None
    return plots


def data_name(data: Path) -> str:
    """What a data set is called in reports: its folder and its file."""
    return f"{data.resolve().parent.name}/{data.name}"
