"""What the server asks of an engine: token ids in, logits over an adapter's choices out. `load` knows every engine."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from scalabl.config import AdapterConfig
from scalabl.evaluation.precision_change import QuantizationChange
from scalabl.model.posterior import Draws, Scheme, draw
from scalabl.passes.prefix_cache import PrefixStore
from scalabl.prompt import Prompter
from scalabl_server.batching.jobs import Job, Result
from scalabl_server.methods import Method
from scalabl_server.observe.metrics import Metrics
from scalabl_server.problems import ProblemError
from scalabl_server.settings import ServeSettings


@dataclass(eq=False)
class Served:
    """One adapter, ready to answer. What only its engine needs of it is in a subclass.

    Attributes:
        draws: (num_samples, seed) -> the draws, which are kept for the next requests with the same arguments. Any thread may
            ask.
        relative_spread: by which a linearisation is trusted or not.
        pads: whether a pass computes the padding of its inputs.
        quantization_change: what `--quantization` changes in its answers; None where it is not known.
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
    draws: Callable[[int, int], Draws] = field(init=False)
    quantization_change: QuantizationChange | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        # A cache of its own, so that it goes when the adapter goes.
        self.draws = functools.lru_cache(maxsize=64)(
            lambda num_samples, seed: draw(seed, num_samples, self.stochastic_parameters, self.scheme)
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Engine(ABC):
    """A base model with its adapters. `run`, `check` and `release` belong to the model's thread."""

    adapters: dict[str, Served] = field(default_factory=dict)
    default_adapter: str
    model_name: str
    architecture: str
    dtype: str
    device: str
    max_input_tokens: int
    target_batch_tokens: int
    settings: ServeSettings
    prefixes: PrefixStore = field(default_factory=lambda: PrefixStore(0))  # for an engine that keeps none here

    def adapter(self, name: str | None) -> Served:
        """The adapter of this name; None is the default one.

        Raises:
            ProblemError: `unknown-adapter`, with the names that there are.
        """
        served = self.adapters.get(self.default_adapter if name is None else name)
        if served is None:
            names = ", ".join(map(repr, sorted(self.adapters))) or "no adapter"
            wanted = "the default adapter" if name is None else repr(name)
            raise ProblemError("unknown-adapter", f"{wanted} is not loaded; this server has {names}", field="adapter")
        return served

    @abstractmethod
    def run(self, served: Served, sequences: Sequence[Sequence[int]], jobs: Sequence[Job]) -> list[Result]:
        """One batch: B prompts of one adapter, each with its job."""

    @abstractmethod
    def read(self, name: str, folder: Path) -> Callable[[], Served]:
        """Read an adapter's files. Any thread may, while the model's runs passes; what is returned, only the prompts' may.

        Raises:
            AdapterError, PromptError: what is wrong, and with which file, module or field.
        """

    @abstractmethod
    def check(self, served: Served) -> None:
        """Make an adapter ready for its first request.

        Raises:
            AdapterError: it changes no logit, or has more stochastic parameters than the draw scheme reaches.
        """

    @abstractmethod
    def release(self, served: Served) -> None:
        """Keep nothing of an adapter that was unloaded or replaced."""

    def check_request(self, method: Method, seed: int | None) -> None:
        """Raises ProblemError `invalid-field` for what this engine cannot do. `seed`: None where the request names none."""
        return

    def check_ready(self) -> None:
        """Raises ProblemError `engine-unavailable` while a request could not be answered. Any thread may ask."""
        return

    def watch(self, metrics: Metrics) -> None:
        """Count what this engine alone has to count in these metrics."""
        return

    def close(self) -> None:
        """Let go of threads and connections."""
        return
