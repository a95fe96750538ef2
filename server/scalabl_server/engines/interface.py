"""The interface of engines: token ids in, logits over an adapter's choices out. The module `load` picks the engine."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scalabl.config import AdapterConfig
from scalabl.evaluation.precision_change import QuantizationChange
from scalabl.model.posterior import Draws, Scheme, draw_members
from scalabl.passes.prefix_cache import PrefixStore
from scalabl.prompt import Prompter
from scalabl.uncertainty.drift import DriftMartingale
from scalabl.uncertainty.novelty import NoveltyReference
from scalabl_server.batching.jobs import Job, Result
from scalabl_server.methods import Method
from scalabl_server.observe.metrics import Metrics
from scalabl_server.problems import ProblemError
from scalabl_server.settings import ServeSettings


@dataclass(eq=False)
class Served:
    """One loaded adapter, ready to answer. Each engine adds what it needs in a subclass.

    Attributes:
        scheme: how the posterior samples are drawn.
        stochastic_parameters: of all members together.
        draws: (num_samples, seed) -> the draws. They are cached; any thread may call it.
        relative_spread: median of scale * sigma / |mu|; if it is large, linearised answers are inaccurate.
        pads: whether a pass computes the padding of its inputs.
        shape: adapters for which it is equal may share a pass; they agree in `pads`. At first it is equal to no other's.
        quantization_change: how `--quantization` changes the adapter's answers; None if it was not measured.
        novelty: recognises inputs unlike the training rows; None without a reference, or if the engine has no hidden states.
        drift: sees the novelty scores of the answered inputs, on the event loop; None without p-values.
    """

    name: str
    config: AdapterConfig
    prompter: Prompter
    scheme: Scheme
    adapted_layers: int
    stochastic_parameters: int
    additional_parameters: int
    relative_spread: float
    pads: bool = field(default=True, init=False)
    shape: Hashable = field(default_factory=object, init=False)
    draws: Callable[[int, int], Draws] = field(init=False)
    quantization_change: QuantizationChange | None = field(default=None, kw_only=True)
    novelty: NoveltyReference | None = field(default=None, kw_only=True)
    drift: DriftMartingale | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.novelty is not None and self.novelty.calibration is not None:
            self.drift = DriftMartingale(self.novelty.calibration.tolist())
        # One cache per adapter, so that it is freed together with the adapter.
        members = self.config.members
        self.draws = functools.lru_cache(maxsize=64)(
            lambda num_samples, seed: draw_members(
                seed, num_samples, self.stochastic_parameters // members, members, self.scheme
            )
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Engine(ABC):
    """A base model with its adapters. `run`, `check` and `release` are called on the model thread only."""

    adapters: dict[str, Served] = field(default_factory=dict)
    default_adapter: str
    model_name: str
    architecture: str
    dtype: str
    device: str
    max_input_tokens: int
    target_batch_tokens: int
    settings: ServeSettings
    prefixes: PrefixStore = field(default_factory=lambda: PrefixStore(0))  # empty, for engines without a prefix cache

    def adapter(self, name: str | None) -> Served:
        """The loaded adapter with this name; None stands for the default adapter.

        Raises:
            ProblemError: `unknown-adapter`; the detail lists the loaded adapters.
        """
        served = self.adapters.get(self.default_adapter if name is None else name)
        if served is None:
            names = ", ".join(map(repr, sorted(self.adapters))) or "no adapter"
            wanted = "the default adapter" if name is None else repr(name)
            raise ProblemError("unknown-adapter", f"{wanted} is not loaded; this server has {names}", field="adapter")
        return served

    @abstractmethod
    def run(self, served: Sequence[Served], sequences: Sequence[Sequence[int]], jobs: Sequence[Job]) -> list[Result]:
        """Run one batch: B prompts, each with its adapter and its job. The adapters have equal shapes."""

    @abstractmethod
    def read(self, name: str, folder: Path) -> Callable[[], Served]:
        """Read an adapter's files, on any thread. The returned function uses the tokenizer; call it on the prompt thread.

        Raises:
            AdapterError, PromptError: what is wrong, and in which file, module or field.
        """

    @abstractmethod
    def check(self, served: Served) -> None:
        """Check an adapter and make it ready for its first request.

        Raises:
            AdapterError: it changes no logit, or the base model cannot run it exactly (transformers); the message says why.
        """

    @abstractmethod
    def release(self, served: Served) -> None:
        """Free everything that belongs to an adapter which was unloaded or replaced."""

    def check_request(self, method: Method, seed: int | None) -> None:
        """Raise ProblemError `invalid-field` if this engine does not support the method or the seed (None: not set)."""
        return

    def check_ready(self) -> None:
        """Raise ProblemError `engine-unavailable` if requests cannot be answered now. Any thread may call this."""
        return

    def watch(self, metrics: Metrics) -> None:
        """Report the metrics that only this engine has."""
        return

    def close(self) -> None:
        """Stop the engine's threads and close its connections."""
        return
