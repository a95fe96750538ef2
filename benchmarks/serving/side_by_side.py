"""What several adapters in one pass cost: a mixture against one adapter, and mixed traffic against one adapter's.

python -m benchmarks.serving.side_by_side --model <folder> [--only mixture,traffic] [--output build/bench]

* `mixture`: passes of a mixture of M members, K samples in all, in turns with passes of one adapter with K samples. Its
  logits are compared with those of M adapters of their own first.
* `traffic`: clients that each ask again as soon as they are answered, so that the queue is never empty, through the
  server's own batcher and engine, without HTTP. All for one adapter, for two in turns with shared passes, and for two with
  passes of one adapter each, in turns.

The members and the second adapter are the example's with noise. On a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import example
from benchmarks.parts import add_only, chosen_parts
from benchmarks.report import Line, Report
from benchmarks.serving.workload import inputs_of
from benchmarks.timing import in_turns, ratio, ratio_text
from scalabl.base.pretrained import load_pretrained
from scalabl.config import AdapterConfig
from scalabl.files.adapter_directory import load_adapter, read_config, read_weights, save_adapter
from scalabl.files.combination import mixture_of
from scalabl.model.token_batch import TokenBatch
from scalabl.prompt import Prompter

PARTS = ("mixture", "traffic")
NOISE = 0.05  # of the values of a tensor, as a share of their standard deviation


def with_noise(weights: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """An adapter's tensors with noise, as of another training."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + NOISE * tensor.std() * torch.randn(tensor.shape, generator=generator)
        for name, tensor in weights.items()
    }


def example_adapter(layers: int | None, blocks: int) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """The example's adapter without its calibration, on the last `layers` blocks only if that is a number."""
    config = read_config(example.ADAPTER)
    fields: dict[str, Any] = {"posterior_scale": 1.0, "temperature": 1.0, "calibration": None}
    weights = read_weights(example.ADAPTER)
    if layers is not None:
        kept = tuple(range(blocks - layers, blocks))
        fields["layers_to_transform"] = kept
        names = [f".{index}." for index in kept]
        weights = {n: t for n, t in weights.items() if any(part in n for part in names) or n.startswith("lm_head")}
    return config.model_copy(update=fields), weights


def mixture(options: argparse.Namespace, line: Line, folder: Path) -> list[dict[str, Any]]:
    """Passes of a mixture over passes of one adapter, for each number of adapted blocks, samples and kind of prompt."""
    pretrained = load_pretrained(options.model)
    blocks = pretrained.model.config.get_text_config().num_hidden_layers
    line(f"\nA mixture of {options.members} members over one adapter, both with K samples, {options.inputs} inputs a pass")
    line(f"{'blocks':>7}{'prompts':>9}{'K':>4}{'one, s':>9}{'mixture, s':>12}{'ratio':>24}{'logits within':>15}")
    rows = []
    for layers in options.layers:
        config, weights = example_adapter(layers or None, blocks)
        members = [with_noise(weights, seed) for seed in range(options.members)]
        name = f"{layers or blocks}"
        for number, tensors in enumerate(members):
            save_adapter(folder / f"{name}-{number}", config, tensors)
        save_adapter(folder / name, *mixture_of([config] * len(members), members))
        one, several = (load_adapter(pretrained.model, folder / path) for path in (f"{name}-0", name))
        prompter = Prompter(config.task, pretrained.tokenizer)
        for kind in options.prompts:
            batch = TokenBatch.of(inputs_of(prompter, kind, options.inputs))
            for count in options.samples:
                logits = several.logits(batch, several.draws(count))
                error = 0.0
                for number in range(options.members):
                    alone = load_adapter(pretrained.model, folder / f"{name}-{number}")
                    own = alone.logits(batch, several.draws(count).of_member(number))
                    error = max(error, float((logits[:, number :: options.members] - own).abs().max()))
                passes = {
                    "one": partial(one.logits, batch, one.draws(count)),
                    "mixture": partial(several.logits, batch, several.draws(count)),
                }
                in_turns(passes, 1)
                seconds = in_turns(passes, options.rounds)
                row = {
                    "blocks": name,
                    "prompts": kind,
                    "num_samples": count,
                    "largest_difference": error,
                    "seconds": seconds,
                }
                row["ratio"] = ratio(seconds["mixture"], seconds["one"])
                rows.append(row)
                times = [statistics.median(seconds[form]) for form in passes]
                line(
                    f"{name:>7}{kind:>9}{count:>4}{times[0]:>9.3f}{times[1]:>12.3f}{_three(row['ratio']):>24}{error:>15.0e}"
                )
    return rows


def _three(figures: dict[str, float]) -> str:
    return f"{figures['median']:.3f} ({figures['lowest']:.3f}-{figures['highest']:.3f})"


def traffic(options: argparse.Namespace, line: Line, folder: Path) -> dict[str, Any]:
    """Requests per second of one adapter, of two that share passes, and of two that do not."""
    from scalabl_server.batching.admission import Admission
    from scalabl_server.batching.batcher import Batcher
    from scalabl_server.batching.jobs import SampledJob
    from scalabl_server.engines.interface import Served
    from scalabl_server.engines.load import load_engine
    from scalabl_server.observe.metrics import Metrics
    from scalabl_server.settings import ServeSettings

    config, weights = read_config(example.ADAPTER), read_weights(example.ADAPTER)
    save_adapter(folder / "second", config, with_noise(weights, 1))
    settings = ServeSettings(
        adapter=example.ADAPTER,
        adapter_name="first",
        adapters=f"second={folder / 'second'}",
        model=options.model,
        num_samples=options.samples[0],
        prefix_cache_bytes=0,
        target_batch_tokens=options.budget,
    )
    queries = (example.queries() * options.requests)[: options.requests]
    with ThreadPoolExecutor(1) as executor:
        engine = executor.submit(load_engine, settings).result()
        adapters = [engine.adapters["first"], engine.adapters["second"]]
        assert adapters[0].shape == adapters[1].shape
        jobs = {
            served: SampledJob(served.draws(settings.num_samples, settings.seed), len(served.config.task.choices))
            for served in adapters
        }
        passes: list[int] = []

        async def run(targets: Sequence[Served], shape: Callable[[Served], Hashable]) -> None:
            metrics = Metrics()
            admission = Admission(10**6, 10**9, metrics)

            def one_pass(*arguments: Any) -> Any:
                passes.append(len(arguments[1]))
                return engine.run(*arguments)

            batcher: Batcher[Served] = Batcher(
                one_pass,
                executor,
                admission,
                metrics,
                target_tokens=engine.target_batch_tokens,
                max_tokens=settings.max_batch_tokens,
                pads=lambda served: served.pads,
                shape=shape,
            )
            batcher.start()
            left = iter(zip(queries, targets, strict=True))

            async def client() -> None:
                for query, served in left:
                    ids = served.prompter.encode(query)
                    place = admission.enter([1], 10**6, 0)
                    await asyncio.gather(*batcher.submit(served, [ids], [jobs[served]], place))

            await asyncio.gather(*(client() for _ in range(options.clients)))
            await batcher.stop()

        mixed = [adapters[number % 2] for number in range(len(queries))]
        forms = {
            "one adapter": partial(run, [adapters[0]] * len(queries), lambda served: served.shape),
            "two, shared passes": partial(run, mixed, lambda served: served.shape),
            "two, a pass each": partial(run, mixed, lambda served: served.name),
        }
        line(
            f"\n{options.clients} clients, {len(queries)} requests a round, K = {settings.num_samples}, passes of up to "
            f"{engine.target_batch_tokens} tokens"
        )
        inputs_of_passes: dict[str, float] = {}

        def timed(name: str) -> None:
            passes.clear()
            asyncio.run(forms[name]())
            inputs_of_passes[name] = statistics.mean(passes)

        methods = {name: partial(timed, name) for name in forms}
        in_turns(methods, 1)
        seconds = in_turns(methods, options.rounds)
        engine.close()
    line(f"{'':<20}{'requests / s':>13}{'inputs a pass':>15}{'of one adapter':>24}")
    result: dict[str, Any] = {"seconds": seconds, "inputs_a_pass": inputs_of_passes}
    for name, taken in seconds.items():
        share = result[name] = ratio(seconds["one adapter"], taken)
        rate = len(queries) / statistics.median(taken)
        line(f"{name:<20}{rate:>13.2f}{inputs_of_passes[name]:>15.1f}{ratio_text(share):>24}")
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving.side_by_side", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="base model: a folder (examples.intent_router.base_model)")
    add_only(parser, PARTS)
    parser.add_argument("--members", type=int, default=3, help="of the mixture")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 4], help="last blocks that are adapted; 0: all")
    parser.add_argument("--prompts", nargs="+", default=["short", "medium"], choices=("short", "medium", "long"))
    parser.add_argument("--samples", type=int, nargs="+", default=[6], help="K")
    parser.add_argument("--inputs", type=int, default=8, help="of a pass, for the mixture")
    parser.add_argument("--clients", type=int, default=8, help="of the traffic")
    parser.add_argument("--requests", type=int, default=64, help="of the traffic, in a round")
    parser.add_argument("--budget", type=int, help="tokens of a pass (default: as the server measures)")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--output", type=Path, help="a folder for side_by_side.txt and side_by_side.json")
    options = parser.parse_args()
    parts = chosen_parts(parser, options.only, PARTS)
    report = Report("side_by_side", options.output)
    with tempfile.TemporaryDirectory() as scratch:
        for name, measure in (("mixture", mixture), ("traffic", traffic)):
            if name in parts:
                report.results[name] = measure(options, report.line, Path(scratch))
    report.save()


if __name__ == "__main__":
    main()
