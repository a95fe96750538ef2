"""The curvature of the log-likelihood of a data set over the subspace scalars, row by row, and its state on disk.

What follows from it is in `uncertainty.laplace`; the whole fit is in `posterior_fit`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from scalabl.config import Covariance
from scalabl.errors import OutputError
from scalabl.evaluation.encoded import EncodedSet
from scalabl.files.atomic import write_file
from scalabl.files.output_folder import REMEDY, write_errors
from scalabl.model.derivatives import derivatives
from scalabl.model.scalabl_model import ScalaBLModel
from scalabl.model.token_batch import TokenBatch
from scalabl.passes.batches import batches
from scalabl.uncertainty.absent_choices import without_absent
from scalabl.uncertainty.laplace import EXACT, softmax_root

BATCH_TOKENS = 2048
SECONDS_BETWEEN_SAVES = 30.0


@dataclass(frozen=True)
class Sums:
    """What the rows seen so far add up to.

    Attributes:
        matrix: sum_n J_n^T (diag(p_n) - p_n p_n^T) J_n, [M, P, P], or its diagonal [M, P]. float64.
        log_likelihood: sum_n ln p(y_n | mu), over rows and members, in nats.
        passes: rows of the reverse passes.
    """

    matrix: Tensor
    log_likelihood: float = 0.0
    passes: int = 0

    def scaled(self, factor: float) -> Sums:
        """As of `factor` times as many rows."""
        return Sums(factor * self.matrix, factor * self.log_likelihood, self.passes)


class SavedSums:
    """The sums of the first batches in a file, so that a computation that was cut short goes on where it was.

    Args:
        made_from: what decides the sums, part by part; the file of another computation is refused.
    """

    def __init__(self, path: Path, made_from: Mapping[str, str]) -> None:
        self.path, self._made_from, self._saved = path, dict(made_from), time.monotonic()

    def read(self) -> tuple[int, Sums] | None:
        """(number of batches, their sums); None if there is no file.

        Raises:
            OutputError: the file belongs to another computation or cannot be read.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                notes = {name: json.loads(text) for name, text in (file.metadata() or {}).items()}
                matrix = file.get_tensor("matrix")
            made_from, count = notes["made_from"], int(notes["batches"])
            sums = Sums(matrix, float(notes["log_likelihood"]), int(notes["passes"]))
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise OutputError(f"{self.path} cannot be read as the state of a fit: {error}; {REMEDY}") from None
        changed = [part for part, value in self._made_from.items() if made_from.get(part) != value]
        if changed:
            raise OutputError(f"{self.path} is the state of another fit, with other {' and '.join(changed)}; {REMEDY}")
        return count, sums

    def write(self, count: int, sums: Sums, *, at_once: bool = False) -> None:
        """Store the sums of the first `count` batches, unless that was done less than `SECONDS_BETWEEN_SAVES` ago."""
        if not at_once and time.monotonic() - self._saved < SECONDS_BETWEEN_SAVES:
            return
        notes = {
            "made_from": self._made_from,
            "batches": count,
            "log_likelihood": sums.log_likelihood,
            "passes": sums.passes,
        }
        metadata = {name: json.dumps(value) for name, value in notes.items()}
        with write_errors(self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_file(self.path, save({"matrix": sums.matrix.contiguous()}, metadata=metadata))
        self._saved = time.monotonic()

    def remove(self) -> None:
        """Remove the file, and its folder if nothing else is in it."""
        with write_errors(self.path.parent):
            self.path.unlink(missing_ok=True)
            if self.path.parent.is_dir() and not any(self.path.parent.iterdir()):
                self.path.parent.rmdir()


def sum_curvature(
    model: ScalaBLModel,
    encoded: EncodedSet,
    rows: Tensor,
    covariance: Covariance,
    *,
    seed: int = 0,
    exact: float = EXACT,
    saved: SavedSums | None = None,
    on_progress: Callable[[int], object] | None = None,
) -> Sums:
    """The sums of some rows of a data set, with the scalars at their means and without a temperature.

    Args:
        rows: [N], indices of the rows.
        seed: of the random signs; those of a row do not depend on the other rows.
        exact: as of `softmax_root`.
        saved: where to go on from, and where to store the sums now and then.
        on_progress: called after each batch with its number of rows.
    """
    indices = rows.tolist()
    plan = list(batches([len(encoded.sequences[i]) for i in indices], 1, BATCH_TOKENS))
    size = model.num_stochastic_parameters
    done, sums = 0, Sums(torch.zeros(model.members, size, *([size] if covariance == "full" else []), dtype=torch.float64))
    if saved is not None and (previous := saved.read()) is not None:
        done, sums = previous
        if on_progress is not None:
            on_progress(sum(map(len, plan[:done])))
    for count, batch in enumerate(plan[done:], start=done + 1):
        sums = _with_batch(model, encoded, [indices[i] for i in batch], sums, seed, exact)
        if saved is not None:
            saved.write(count, sums)
        if on_progress is not None:
            on_progress(len(batch))
    if saved is not None:
        saved.write(len(plan), sums, at_once=True)
    return sums


def _with_batch(model: ScalaBLModel, encoded: EncodedSet, rows: list[int], sums: Sums, seed: int, exact: float) -> Sums:
    """The sums with the rows of one batch added."""
    batch = TokenBatch.of([encoded.sequences[row] for row in rows])
    ids = batch.right_padded()[0].to(model.device)
    # A copy, since autograd refuses tensors of the inference mode.
    states = model.trunk_states(ids).clone() if model.trunk.has_states else None
    logits = without_absent(model.logits(batch, model.mean_draw(), states).cpu(), encoded.num_choices[rows]).double()
    answers = encoded.answers[rows].view(-1, 1, 1).expand(-1, logits.shape[1], 1)
    log_likelihood = float(torch.log_softmax(logits, -1).gather(-1, answers).sum())
    places: list[tuple[int, int]] = []  # (input, member) of each reverse pass
    roots: list[Tensor] = []
    for position, row in enumerate(rows):
        for member in range(model.members):
            root = softmax_root(logits[position, member], np.random.default_rng((seed, row, member)), exact=exact)
            places += [(position, member)] * len(root)
            roots.append(root)
    matrix = sums.matrix.clone()
    if places:
        inputs, members = torch.tensor(places).unbind(1)
        slopes = derivatives(model, batch, inputs, members, torch.cat(roots).float(), states=states)[1].double().cpu()
        for member, of_member in enumerate(matrix):
            own = slopes[members == member]
            of_member += own.square().sum(0) if of_member.dim() == 1 else own.T @ own
    return Sums(matrix, sums.log_likelihood + log_likelihood, sums.passes + len(places))
