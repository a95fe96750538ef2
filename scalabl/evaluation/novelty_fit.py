"""Makes and calibrates an adapter's novelty reference: runs the adapter over its training rows and over held-out rows.

The mathematics is in `uncertainty.novelty`, the file in `files.novelty_file`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from scalabl.config import AdapterConfig, Novelty, NoveltyCalibration
from scalabl.errors import AdapterError, CalibrationError
from scalabl.evaluation.encoded import EncodedSet
from scalabl.evaluation.inference import readings_of
from scalabl.files.adapter_directory import probe_prompt
from scalabl.files.novelty_file import save_novelty, weights_sha256
from scalabl.model.posterior import Draws
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.passes.trunk_cache import TrunkCache
from scalabl.uncertainty.novelty import NEIGHBOURS, NoveltyReference, covering_rows, fit_reference, rows_for_level

READ_ROWS = 4  # times the rows that a reference keeps: so many are run, and give its mean and whitening
SAME_BASE = 0.8  # the least cosine of the test prompt's unit vector and the stored one; the same base gives nearly 1


def make_reference(
    model: ScalaBLModel,
    encoded: EncodedSet,
    *,
    most_rows: int,
    on_progress: Callable[[int], object] | None = None,
    trunk: TrunkCache | None = None,
) -> NoveltyReference:
    """The novelty reference of an adapter from its training rows, at the posterior mean.

    The mean does not depend on the posterior scale, so a later calibration keeps the reference. Of many rows only some are
    run, a random part of each class.

    Args:
        on_progress: called after each batch with its number of inputs.
        trunk: the trunk's output for the rows, if it is there from the training.

    Raises:
        CalibrationError: the rows cannot give a reference.
    """
    chosen = covering_rows(encoded.answers, READ_ROWS * most_rows)
    sequences = [encoded.sequences[row] for row in chosen.tolist()]
    of_trunk = None if trunk is None else lambda indices, width: trunk.of(chosen[indices], width)
    states = readings_of(model, sequences, model.mean_draw(), on_progress=on_progress, states=of_trunk).states
    try:
        return fit_reference(states, encoded.answers[chosen], _probe_state(model), most_rows=most_rows)
    except ValueError as error:
        raise CalibrationError(f"{encoded.name}: {error}") from None


def description_of(folder: Path, config: AdapterConfig, encoded: EncodedSet, reference: NoveltyReference) -> Novelty:
    """What `adapter_config.json` says of a reference that was made from these rows for the adapter in a folder."""
    components, width = reference.projection.shape
    return Novelty(
        data=encoded.description,
        base_model_name_or_path=config.base_model_name_or_path,
        weights_sha256=weights_sha256(folder),
        width=width,
        components=components,
        rows=len(reference.rows),
        neighbours=NEIGHBOURS,
    )


def write_reference(
    folder: Path, model: ScalaBLModel, encoded: EncodedSet, *, most_rows: int, trunk: TrunkCache | None = None
) -> None:
    """Make a novelty reference from training rows, and write it beside the adapter in a folder; see `make_reference`.

    Raises:
        CalibrationError: the rows cannot give a reference.
    """
    reference = make_reference(model, encoded, most_rows=most_rows, trunk=trunk)
    save_novelty(folder, model.config, description_of(folder, model.config, encoded, reference), reference)


def check_rows_for_level(rows: int, level: float) -> None:
    """Check that held-out rows suffice for a level.

    Raises:
        CalibrationError: with so few rows no p-value reaches the level, so that no input could be called novel.
    """
    if rows < rows_for_level(level):
        raise CalibrationError(
            f"a novelty level of {level:g} needs at least {rows_for_level(level)} held-out rows and there are {rows}; "
            "give more rows or raise --novelty-level"
        )


def calibrated_reference(
    model: ScalaBLModel,
    encoded: EncodedSet,
    draws: Draws,
    reference: NoveltyReference,
    *,
    on_progress: Callable[[int], object] | None = None,
) -> NoveltyReference:
    """A reference with p-values from held-out rows, which are scored as a server scores inputs under these draws.

    Half of these rows may have fitted the posterior scale. It is one number that acts on all inputs alike, so these rows and
    new inputs remain exchangeable for all that can be seen.
    """
    states = readings_of(model, encoded.sequences, draws, on_progress=on_progress).states
    return reference.calibrated(reference.scores(states))


def calibration_of(encoded: EncodedSet, draws: Draws, level: float) -> NoveltyCalibration:
    """What `adapter_config.json` says of p-values that come from these held-out rows under these draws."""
    return NoveltyCalibration(
        data=encoded.description,
        level=level,
        num_samples=draws.num_samples,
        seed=draws.seed,
        draw_scheme=draws.scheme,
    )


def check_same_base(model: ScalaBLModel, reference: NoveltyReference) -> None:
    """Check that a reference was made with this base model, by the state of a test prompt.

    Quantising the base model changes the state a little; another base model changes it altogether.

    Raises:
        AdapterError: the state is another one.
    """
    cosine = float(reference.coordinates(_probe_state(model).unsqueeze(0))[0] @ reference.probe)
    if not cosine >= SAME_BASE:
        raise AdapterError(
            f"novelty.safetensors was made with another base model: the hidden states of a test prompt have a cosine of "
            f"{cosine:.2f}, below {SAME_BASE:g}; serve the adapter on its own base model, or make the reference again with "
            "`scalabl calibrate --reference`"
        )


def _probe_state(model: ScalaBLModel) -> Tensor:
    """The hidden state [D] of the test prompt at the posterior mean."""
    return readings_of(model, [probe_prompt(model)], model.mean_draw()).states[0]
