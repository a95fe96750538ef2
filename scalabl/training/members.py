"""Training the members of a mixture: one run for each, with a seed of its own, and their combination.

A single run is in `trainer`, the combination of adapters in `files.combination`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel

from scalabl.config import AdapterConfig
from scalabl.evaluation.encoded import EncodedSet
from scalabl.evaluation.inference import logits_of, predictive_of
from scalabl.evaluation.novelty_fit import write_reference
from scalabl.evaluation.scoring import scores
from scalabl.files.adapter_directory import load_weights, read_config, read_weights, save_adapter
from scalabl.files.combination import mixture_of
from scalabl.files.output_folder import MEMBERS
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.passes.probes import find_shared_work
from scalabl.passes.trunk_cache import TrunkCache, trunk_cache
from scalabl.training.recipe import TrainingConfig
from scalabl.training.run_folder import TrainingRun, begin, find_run, finish
from scalabl.training.trainer import StartingPoint, Trained, train_adapter


def train_members(
    base: PreTrainedModel,
    config: AdapterConfig,
    recipe: TrainingConfig,
    train: EncodedSet,
    validation: EncodedSet,
    output: Path,
    start: StartingPoint | None = None,
    *,
    overwrite: bool = False,
    on_member: Callable[[int, Path], object] | None = None,
) -> Trained:
    """Train a mixture and write it to `output`. Its members are trained in `output/members`, each as by `train_adapter`.

    Member m has the seed of the recipe plus m, for its initialisation, the order of examples and its draws. Members share
    the cached trunk states. What was interrupted goes on where it was.

    Args:
        config: has the number of members.
        on_member: called before each member's run with its number, from 0, and its folder.

    Raises:
        OutputError: `output` or a member's folder belongs to another run, or cannot be written.
    """
    run = TrainingRun.of(config, recipe, train, validation, None if start is None else start.origin, base)
    previous = find_run(output, run, overwrite=overwrite)
    if previous is not None and previous.result is not None:
        return Trained(previous.result.metrics, was_finished=True)
    if previous is None:
        begin(output, run)
    alone = config.model_copy(update={"members": 1, "format_version": 1})
    caches = _trunk_caches(base, alone, recipe, train, validation)
    folders = [output / MEMBERS / str(member) for member in range(config.members)]
    metrics: dict[str, float] = {}
    for member, folder in enumerate(folders):
        if on_member is not None:
            on_member(member, folder)
        own = recipe.model_copy(update={"seed": recipe.seed + member, "novelty": False})  # the mixture gets a reference
        trained = train_adapter(base, alone, own, train, validation, folder, start, caches)
        metrics |= {f"member_{member}_{name}": trained.metrics[name] for name in ("eval_loss", "eval_accuracy")}
    mixture, weights = mixture_of([read_config(folder) for folder in folders], [read_weights(folder) for folder in folders])
    model = ScalaBLModel(base, mixture)
    load_weights(model, weights)
    find_shared_work(model.eval())
    draws = model.draws(recipe.eval_samples * config.members, seed=recipe.seed)
    states = None if caches[1] is None else caches[1].of
    outcome = predictive_of(
        logits_of(model, validation.sequences, draws, states=states), validation.num_choices, model, draws
    )
    metrics |= {f"eval_{name}": value for name, value in scores(outcome, validation.answers).items()}
    metrics["eval_loss"] = metrics.pop("eval_nll")
    metrics["stochastic_parameters"] = model.members * model.num_stochastic_parameters
    metrics["additional_parameters"] = sum(p.numel() for p in model.adapter_parameters().values())
    save_adapter(output, mixture, weights)
    if recipe.novelty:
        write_reference(output, model, train, most_rows=recipe.novelty_rows, trunk=caches[0])
    finish(output, run, metrics)
    return Trained(metrics)


def _trunk_caches(
    base: PreTrainedModel, config: AdapterConfig, recipe: TrainingConfig, train: EncodedSet, validation: EncodedSet
) -> tuple[TrunkCache | None, TrunkCache | None]:
    """The trunk states of both sets of rows, which are the same for every member."""
    model = ScalaBLModel(base, config)
    model.reset_adapter(recipe.seed)
    find_shared_work(model)
    states = [trunk_cache(model, rows.sequences, recipe.trunk_cache_gib) for rows in (train, validation)]
    model.detach()
    return states[0], states[1]
