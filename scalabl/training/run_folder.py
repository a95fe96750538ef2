"""Which training run a folder belongs to: the record of what the run was made from, and its comparison with another run.

The training itself is in `trainer`. The record is `training_run.json` in the run's output folder.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterable, Set
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor
from transformers import PreTrainedModel

from scalabl.config import AdapterConfig
from scalabl.errors import OutputError
from scalabl.evaluation.encoded import EncodedSet
from scalabl.files.adapter_directory import CONFIG_FILE, WEIGHTS_FILE, read_config
from scalabl.files.atomic import write_file
from scalabl.files.output_folder import (
    REMEDY,
    RUN_FILE,
    check_folder,
    holds_adapter_or_checkpoints,
    remove_adapter,
    write_errors,
)
from scalabl.model.attachment import Host
from scalabl.training.recipe import TrainingConfig

# Options of the recipe that decide how a run is computed or logged, not what it learns. A run may resume with others.
NOT_COMPARED = {"gradient_checkpointing", "trunk_cache_gib", "tensorboard"}
# Fields of an adapter that training does not set: the format's and those of calibration and fit.
NOT_TRAINED = {"peft_type", "format_version", "posterior_scale", "temperature", "calibration", "covariance", "posterior_fit"}
# Settings that change the token ids of the rows, so that other ids do not show that the rows themselves differ.
IN_PROMPTS = {"kind", "template", "chat", "choices", "special_tokens_in_text", "chat_date", "head"}
# Parts of a base model's configuration that say nothing about the model.
INCIDENTAL = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache"}
SHOWN = 100  # characters of a value in a message


class Record(BaseModel):
    """A part of the record of a run."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Rows(Record):
    """The rows of a data set, as they were encoded: the file's name, and hashes of the answers and of the token ids."""

    file: str
    count: int
    answers_sha256: str
    tokens_sha256: str

    @classmethod
    def of(cls, encoded: EncodedSet) -> Self:
        """The record of a data set."""
        lengths = np.array([len(ids) for ids in encoded.sequences], dtype="<i8")
        tokens = np.concatenate([np.asarray(ids, dtype="<i8") for ids in encoded.sequences])
        answers = [encoded.answers.numpy().astype("<i8"), encoded.num_choices.numpy().astype("<i8")]
        return cls(
            file=encoded.name,
            count=len(encoded.sequences),
            answers_sha256=_sha256(array.tobytes() for array in answers),
            tokens_sha256=_sha256(array.tobytes() for array in (lengths, tokens)),
        )


class Origin(Record):
    """The LoRA that a run starts from."""

    name: str
    sha256: str


class Result(Record):
    """What a finished run wrote and measured."""

    weights_sha256: str
    metrics: dict[str, int | float]


class TrainingRun(Record):
    """What a training run is made from; `result` once it has finished.

    `base_model_sha256` is None as long as the base model has not been loaded; it is then not compared.
    """

    format_version: Literal[1] = 1
    recipe: TrainingConfig
    adapter: AdapterConfig
    base_model_sha256: str | None = None
    training_rows: Rows
    validation_rows: Rows
    init_from: Origin | None = None
    result: Result | None = None

    @classmethod
    def of(
        cls,
        config: AdapterConfig,
        recipe: TrainingConfig,
        train: EncodedSet,
        validation: EncodedSet,
        origin: Origin | None = None,
        base: PreTrainedModel | None = None,
    ) -> Self:
        """The record of a run that has not begun."""
        return cls(
            recipe=recipe,
            adapter=config,
            base_model_sha256=None if base is None else fingerprint_of(base),
            training_rows=Rows.of(train),
            validation_rows=Rows.of(validation),
            init_from=origin,
        )

    @property
    def settings(self) -> dict[str, Any]:
        """The options that decide what is learnt, by name."""
        adapter = _all_fields(self.adapter, exclude={*NOT_TRAINED, "task"})
        return self.recipe.model_dump(mode="json", exclude=NOT_COMPARED) | _all_fields(self.adapter.task) | adapter


def _all_fields(model: BaseModel, exclude: Set[str] = frozenset()) -> dict[str, Any]:
    """A model's fields as JSON values, also those that a dump leaves out because they have their default."""
    defaults = {name: field.default for name, field in type(model).model_fields.items() if name not in exclude}
    return defaults | model.model_dump(mode="json", exclude=set(exclude))


def fingerprint_of(base: PreTrainedModel) -> str:
    """SHA-256 of a base model's configuration and weights, whatever folder they are in. Detaches an adapter."""
    Host.free(base)
    config = {name: value for name, value in base.config.to_diff_dict().items() if name not in INCIDENTAL}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    seen = set()
    for name, tensor in base.state_dict().items():
        if (tensor.data_ptr(), tensor.shape) not in seen:  # tied weights have two names
            seen.add((tensor.data_ptr(), tensor.shape))
            digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def find_run(folder: Path, run: TrainingRun, *, overwrite: bool = False) -> TrainingRun | None:
    """The record of the same run in a folder, finished or not. None if the folder is free, or `overwrite` is true.

    Nothing is written. A folder is free without an adapter, checkpoints and a record; other files do not matter.

    Raises:
        OutputError: the folder belongs to another run or to none, or its adapter was changed after the training.
    """
    check_folder(folder)
    if run.init_from is not None and Path(run.init_from.name).resolve() == folder.resolve():
        raise OutputError(f"{folder} is the LoRA to start from (init_from); choose another --output")
    if overwrite:
        return None
    old = _read(folder)
    if old is None:
        if holds_adapter_or_checkpoints(folder):
            raise OutputError(
                f"{folder} holds an adapter or checkpoints without {RUN_FILE}, which would say what they were made from; "
                f"{REMEDY}"
            )
        return None
    if differences := _differences(old, run):
        raise OutputError(f"{folder} holds another training run: {'; '.join(differences)}; {REMEDY}")
    if old.result is None or not all((folder / name).is_file() for name in (CONFIG_FILE, WEIGHTS_FILE)):
        return old.model_copy(update={"result": None})
    changes = _differences(old, old.model_copy(update={"adapter": read_config(folder)}))
    if _sha256_of_file(folder / WEIGHTS_FILE) != old.result.weights_sha256:
        changes.append(f"{WEIGHTS_FILE} is another file")
    if changes:
        raise OutputError(f"the adapter in {folder} was changed after its training: {'; '.join(changes)}; {REMEDY}")
    return old


def recorded_chat_date(folder: Path) -> datetime.date | None:
    """The date in the prompts of the run in a folder, with which it resumes; None if there is no run or no date.

    Raises:
        OutputError: the folder's record cannot be read.
    """
    old = _read(folder)
    return None if old is None else old.adapter.task.chat_date


def begin(folder: Path, run: TrainingRun) -> None:
    """Remove what another run left in a folder, and write the record of a new run.

    Raises:
        OutputError: the folder cannot be written.
    """
    remove_adapter(folder)
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder, run)


def finish(folder: Path, run: TrainingRun, metrics: dict[str, float]) -> None:
    """Record that a run has finished, once its adapter is in the folder.

    Raises:
        OutputError: the folder cannot be written.
    """
    result = Result(weights_sha256=_sha256_of_file(folder / WEIGHTS_FILE), metrics=metrics)
    with write_errors(folder):
        _write(folder, run.model_copy(update={"result": result}))


def _write(folder: Path, run: TrainingRun) -> None:
    write_file(folder / RUN_FILE, (json.dumps(run.model_dump(mode="json"), indent=2) + "\n").encode())


def _read(folder: Path) -> TrainingRun | None:
    path = folder / RUN_FILE
    try:
        return TrainingRun.model_validate(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise OutputError(f"{path} is not a record that this release reads ({field}: {first['msg']}); {REMEDY}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise OutputError(f"{path} cannot be read: {error}; {REMEDY}") from None


def _differences(old: TrainingRun, new: TrainingRun) -> list[str]:
    """What differs between two runs, each as a short text with the old and the new value."""
    before, now = old.settings, new.settings
    changed = [name for name in now if before[name] != now[name]]
    if "choices" in changed and "choice_tokens" in changed:
        changed.remove("choice_tokens")  # they follow from the choices
    texts = [_difference(name, before[name], now[name]) for name in changed]
    other_base = None not in (old.base_model_sha256, new.base_model_sha256) and (
        old.base_model_sha256 != new.base_model_sha256
    )
    if other_base:
        digests = [str(digest)[:12] for digest in (old.base_model_sha256, new.base_model_sha256)]
        texts.append(_difference("the SHA-256 of the base model", *digests))
    if _sha256_of(old.init_from) != _sha256_of(new.init_from):
        texts.append(_origins(old.init_from, new.init_from))
    same_prompts = not other_base and not IN_PROMPTS & set(changed)
    for rows_before, rows_now in ((old.training_rows, new.training_rows), (old.validation_rows, new.validation_rows)):
        tokens_differ = rows_before.tokens_sha256 != rows_now.tokens_sha256 and same_prompts
        if rows_before.answers_sha256 != rows_now.answers_sha256 or tokens_differ:
            texts.append(_other_rows(rows_before, rows_now))
    return list(dict.fromkeys(texts))  # one file may have both the training and the validation rows


def _difference(name: str, old: Any, new: Any) -> str:
    before, now = _shown(old, new)
    return f"{name} was {before} and is now {now}"


def _shown(old: Any, new: Any) -> tuple[str, str]:
    """Two values on one line each. Of long ones only the place is shown from which they differ."""
    before, now = (json.dumps(value, ensure_ascii=False) for value in (old, new))
    if max(len(before), len(now)) <= SHOWN:
        return before, now
    same = next((i for i, (a, b) in enumerate(zip(before, now, strict=False)) if a != b), min(len(before), len(now)))
    start = max(0, same - SHOWN // 4)
    return _cut(before, start), _cut(now, start)


def _cut(text: str, start: int) -> str:
    part = text[start : start + SHOWN]
    return f"{'…' if start else ''}{part}{'…' if start + SHOWN < len(text) else ''}"


def _origins(old: Origin | None, new: Origin | None) -> str:
    if old is not None and new is not None and old.name == new.name:
        return f"the LoRA in {new.name} (init_from) has changed"
    return _difference("init_from", old and old.name, new and new.name)


def _sha256_of(origin: Origin | None) -> str | None:
    return None if origin is None else origin.sha256


def _other_rows(old: Rows, new: Rows) -> str:
    names = f"the rows of {new.file} differ" + ("" if old.file == new.file else f" from those of {old.file}")
    return names + ("" if old.count == new.count else f" ({old.count} before, {new.count} now)")


def _sha256(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _sha256_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
