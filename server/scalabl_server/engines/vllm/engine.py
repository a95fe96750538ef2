"""The engine that uses vLLM servers. Each posterior sample is an ordinary LoRA there; the base model is not loaded here.

This process makes the prompts and the draws and combines the samples. It uses log-probabilities as the logits of choices:
they differ from logits by a constant per row, which does not change the softmax.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from scalabl.base.pretrained import load_skeleton, longest_prompt
from scalabl.errors import AdapterError
from scalabl.files.adapter_directory import read_config
from scalabl.files.sample_loras import SampleLoras
from scalabl.model.posterior import Draws
from scalabl.prompt import Prompter
from scalabl_server.batching.jobs import Job, Result
from scalabl_server.engines.interface import Engine, Served
from scalabl_server.engines.rounds import sample_in_rounds
from scalabl_server.engines.vllm.client import VllmClient
from scalabl_server.engines.vllm.examination import Examined
from scalabl_server.engines.vllm.pool import Call, EngineError, VllmPool
from scalabl_server.methods import Method
from scalabl_server.observe.metrics import Metrics
from scalabl_server.problems import ProblemError
from scalabl_server.settings import ServeSettings

logger = logging.getLogger("scalabl")


@dataclass(eq=False)
class RemoteAdapter(Served):
    """An adapter whose samples are LoRAs on the servers.

    Attributes:
        lora_of: the member and the bytes of a draw's numbers -> the name of the LoRA of that sample.
    """

    examined: Examined
    lora_of: dict[tuple[int, bytes], str]


@dataclass(frozen=True, eq=False, kw_only=True)
class VllmEngine(Engine):
    """Adapters on a base model that vLLM servers have loaded."""

    pool: VllmPool
    base: str  # name or folder of the base model, to read its shapes
    tokenizer: PreTrainedTokenizerBase

    def run(self, served: Sequence[Served], sequences: Sequence[Sequence[int]], jobs: Sequence[Job]) -> list[Result]:
        """One call per posterior sample, all at once; more calls in further rounds for inputs that need more samples."""
        adapters = [_remote(adapter) for adapter in served]

        def run(indices: Sequence[int], draws: Sequence[Draws]) -> list[Tensor]:
            own = [adapters[index] for index in indices]
            # Few, because inputs share their draws.
            names_of = {(adapter, table.key): _names(adapter, table) for adapter, table in zip(own, draws, strict=True)}
            wanted: dict[tuple[RemoteAdapter, str], list[tuple[int, int]]] = {}  # LoRA -> (input, row of its result)
            for position, table in enumerate(draws):
                for row, name in enumerate(names_of[own[position], table.key]):
                    wanted.setdefault((own[position], name), []).append((position, row))
            calls = [
                Call(adapter.examined, name, [sequences[indices[position]] for position, _ in places])
                for (adapter, name), places in wanted.items()
            ]
            answers = self.pool.score(calls, self.settings.request_timeout)
            logits_of = [
                torch.empty(table.num_samples, len(adapter.examined.tokens))
                for adapter, table in zip(own, draws, strict=True)
            ]
            for places, answer in zip(wanted.values(), answers, strict=True):
                for (position, row), logits in zip(places, answer, strict=True):
                    logits_of[position][row] = logits
            return logits_of

        logits_of = sample_in_rounds(run, jobs, [adapter.config.temperature for adapter in served])
        return [Result(logits_of.get(index)) for index in range(len(jobs))]

    def read(self, name: str, folder: Path) -> Callable[[], Served]:
        settings = self.settings
        skeleton, _ = load_skeleton(self.base, trust_remote_code=settings.trust_remote_code)
        loras = SampleLoras.read(
            folder, skeleton, num_samples=settings.max_samples, seed=settings.seed, scheme=settings.draw_scheme
        )
        return lambda: self._serve(name, loras)

    def _serve(self, name: str, loras: SampleLoras) -> Served:
        samples = loras.loras
        prompter = Prompter(samples.config.task, self.tokenizer)
        prompter.check_tokenizer(samples.config.base_model_name_or_path)
        served = RemoteAdapter(
            name=name,
            config=samples.config,
            prompter=prompter,
            scheme=self.settings.draw_scheme,
            adapted_layers=len(samples.modules),
            stochastic_parameters=samples.posterior.mean.numel(),
            additional_parameters=sum(tensor.numel() for tensor in samples.weights.values()),
            relative_spread=samples.posterior.relative_spread,
            examined=Examined(loras),
            lora_of=dict(zip(_numbers(samples.draws), loras.names, strict=True)),
        )
        served.pads = False  # vLLM does not pad prompts to a common length
        served.shape = "vllm"  # the calls of a pass are independent, so all adapters can share it
        return served

    def check(self, served: Served) -> None:
        """Make the servers load the adapter's LoRAs, and check that they answer correctly with all of them."""
        self.check_ready()
        try:
            self.pool.add(_remote(served).examined)
        except EngineError as error:
            raise AdapterError(str(error)) from None

    def release(self, served: Served) -> None:
        self.pool.remove(_remote(served).examined)

    def check_request(self, method: Method, seed: int | None) -> None:
        """Refuse methods that need gradients, and seeds whose samples the servers do not have."""
        if method != "monte_carlo":
            raise ProblemError(
                "invalid-field",
                f"the method {method} needs gradients, which this server's engine (vLLM) does not provide; "
                "use monte_carlo, or a server with --engine transformers",
                field="method",
            )
        if seed is not None and seed != self.settings.seed:
            raise ProblemError(
                "invalid-field",
                f"this server's engine (vLLM) has only the samples of seed {self.settings.seed}; leave the field out",
                field="seed",
            )

    def check_ready(self) -> None:
        self.pool.check_ready()

    def watch(self, metrics: Metrics) -> None:
        self.pool.watch(metrics)

    def close(self) -> None:
        self.pool.close()


def _remote(served: Served) -> RemoteAdapter:
    assert isinstance(served, RemoteAdapter)  # `read` creates no others
    return served


def _names(served: RemoteAdapter, draws: Draws) -> list[str]:
    """The name of each sample's LoRA, looked up by the numbers of its draw."""
    return [served.lora_of[numbers] for numbers in _numbers(draws)]


def _numbers(draws: Draws) -> list[tuple[int, bytes]]:
    """The member and the bytes of each draw."""
    rows = (row.numpy().tobytes() for row in draws.epsilon)
    return list(zip(draws.member.tolist(), rows, strict=True))


def load(settings: ServeSettings) -> Engine:
    """Read the adapters, and wait until a vLLM server can answer with them.

    Raises:
        AdapterError, BaseModelError, PromptError: what is wrong, and in which file, module or field.
        EngineError: no server can be used; it names the cause for each.
    """
    assert settings.engine_url is not None  # checked by `ServeSettings`
    started = time.perf_counter()
    if "max_samples" not in settings.model_fields_set:  # do not make the servers load more LoRAs than needed
        settings = settings.model_copy(update={"max_samples": settings.num_samples})
    folders = settings.adapter_folders()
    base = settings.model or read_config(settings.adapter).base_model_name_or_path
    skeleton, tokenizer = load_skeleton(base, trust_remote_code=settings.trust_remote_code)
    config: PreTrainedConfig = skeleton.config
    key = settings.engine_api_key.get_secret_value() if settings.engine_api_key is not None else None
    pool = VllmPool(
        [VllmClient(url, key, settings.engine_timeout) for url in settings.engine_urls],
        settings.engine_adapter_dir or settings.data_folder / "engine-adapters",
        settings.engine_timeout,
    )
    longest = settings.longest_prompt(longest_prompt(config, tokenizer))
    reader = VllmEngine(
        default_adapter=settings.default_adapter,
        model_name=Path(base).name if Path(base).is_dir() else base,
        architecture=type(skeleton).__name__,
        dtype="the engine's",
        device="vllm",
        max_input_tokens=longest,
        target_batch_tokens=min(settings.target_batch_tokens or settings.max_batch_tokens, settings.max_batch_tokens),
        settings=settings,
        pool=pool,
        base=base,
        tokenizer=tokenizer,
    )
    adapters = {adapter: reader.read(adapter, folder)() for adapter, folder in folders.items()}
    pool.start(
        [served.examined for served in adapters.values() if isinstance(served, RemoteAdapter)],
        settings.engine_start_timeout,
    )
    if pool.max_tokens is not None:
        longest = min(longest, pool.max_tokens - 1)  # vLLM's limit includes the generated token
    engine = dataclasses.replace(reader, max_input_tokens=longest, adapters=adapters)
    logger.info(
        "%s with %s ready in %.1f s: %d samples each, on %s",
        engine.model_name,
        ", ".join(adapters),
        time.perf_counter() - started,
        settings.max_samples,
        ", ".join(settings.engine_urls),
    )
    return engine
