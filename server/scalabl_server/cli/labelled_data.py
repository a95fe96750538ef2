"""Shared by `evaluate` and `calibrate`: their common options, and loading of the adapter and of the module that plots."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer

from scalabl.config import Quantization
from scalabl.errors import AdapterError, ScalaBLError

if TYPE_CHECKING:
    from scalabl.evaluation.dataset import Example
    from scalabl.evaluation.encoded import EncodedSet
    from scalabl.model.posterior import Draws
    from scalabl.model.scalabl_model import ScalaBLModel
    from scalabl.prompt import Prompter
    from scalabl.uncertainty.novelty import NoveltyReference

Adapter = Annotated[Path, typer.Option(help="The adapter directory.")]
Model = Annotated[
    str | None, typer.Option(help="Base model: a hub id or a folder (default: the base model that the adapter names).")
]
NumSamples = Annotated[int, typer.Option(min=1, help="Number of posterior samples (K) per input.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the posterior samples.")]
Device = Annotated[str, typer.Option(help="Device of the model: cpu, cuda, … (auto: a GPU if there is one).")]
Precision = Annotated[Quantization | None, typer.Option(help="Run linear layers in lower precision, as in `scalabl serve`.")]


@dataclass(frozen=True)
class Loaded:
    """An adapter loaded on its base model, and what turns rows into prompts."""

    model: ScalaBLModel
    prompter: Prompter
    max_tokens: int
    novelty: NoveltyReference | None

    def encode(self, rows: list[Example]) -> EncodedSet:
        """The token ids of the rows."""
        from scalabl.evaluation.encoded import encode_examples

        return encode_examples(self.prompter, rows, self.max_tokens)

    def draws(self, num_samples: int, seed: int) -> Draws:
        """The posterior samples.

        Raises:
            AdapterError: the adapter cannot be sampled so often: it has more members, say.
        """
        try:
            return self.model.draws(num_samples, seed)
        except ValueError as error:
            raise AdapterError(str(error)) from None


def load(
    adapter: Path, model: str | None, device: str, quantization: Quantization | None, *, with_novelty: bool = True
) -> Loaded:
    """Load the adapter in a folder on `model`, or on the base model that it names.

    Args:
        with_novelty: read the novelty reference too, if there is one.
    """
    from scalabl.base.pretrained import load_pretrained
    from scalabl.evaluation.novelty_fit import check_same_base
    from scalabl.files.adapter_directory import load_adapter, read_config
    from scalabl.files.novelty_file import read_novelty
    from scalabl.prompt import Prompter

    config = read_config(adapter)
    pretrained = load_pretrained(model or config.base_model_name_or_path, device=device, quantization=quantization)
    prompter = Prompter(config.task, pretrained.tokenizer)
    loaded = load_adapter(pretrained.model, adapter)
    novelty = read_novelty(adapter, config, loaded.state_width) if with_novelty else None
    if novelty is not None:
        check_same_base(loaded, novelty)
    return Loaded(loaded, prompter, pretrained.max_tokens, novelty)


def plots_module() -> ModuleType:
    """The module that plots, imported before the long computation so that a missing package is reported at once.

    Raises:
        ScalaBLError: matplotlib is not installed.
    """
    try:
        from scalabl.evaluation import plots
    except ModuleNotFoundError:
        raise ScalaBLError("plots need matplotlib; install it with: pip install 'scalabl[plots]'") from None
    return plots


def data_name(data: Path) -> str:
    """The name of a data set in reports: its folder and its file."""
    return f"{data.resolve().parent.name}/{data.name}"
