"""Examples: rows with their choices and their answers, from rows that bring choices or from rows that have a label.

What is remarkable about a set of examples, such as a class without rows, is said in `review`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from scalabl.errors import DatasetError
from scalabl.evaluation.dataset.columns import Columns, shown
from scalabl.evaluation.dataset.sources import Record, Records, read_records


@dataclass(frozen=True)
class Example:
    """One row: the text, its choices, and the index of the true choice (-1: none of them).

    `source` is the row's place, as `file:line`.
    """

    text: str
    choices: tuple[str, ...]
    answer: int
    source: str


@dataclass(frozen=True)
class _Row:
    text: str
    place: str
    label: str | None = None
    choices: tuple[str, ...] | None = None
    answer: int = -1


@dataclass(frozen=True)
class Rows:
    """The rows of a data set, before their labels are looked up.

    Attributes:
        name, sha256: as of `sources.Records`.
        has_labels: whether the rows have labels; otherwise each brings its choices and its answer.
        labels: the labels that the rows have, in the order of `ordered`, or in the order that the data set declares.
    """

    name: str
    sha256: str
    rows: list[_Row] = field(repr=False)
    has_labels: bool
    labels: tuple[str, ...]

    def examples(
        self, labels: Sequence[str] | None, *, labelled: bool = True, unknown: Literal["refuse", "leave out"] = "refuse"
    ) -> tuple[list[Example], Counter[str]]:
        """The examples, and how many rows were left out because of each unknown label.

        A label is one of `labels` by its name. A whole number is its position, counted from 0, if it is not the name of one
        and no name is a whole number.

        Args:
            labels: all choices, in order. Rows that bring their choices ignore them.
            labelled: require an answer. Otherwise a label may be missing or unknown; the answer is then -1.
            unknown: what to do with a label that is not among `labels`.

        Raises:
            DatasetError: an unknown label, or no row is left, or the rows have labels and `labels` is None.
        """
        if not self.has_labels:
            return [Example(row.text, row.choices or (), row.answer, row.place) for row in self.rows], Counter()
        if labels is None:
            raise DatasetError(
                f"{self.rows[0].place}: the row has a label, and multiple choice needs 'choices', a list of strings, and "
                "'answer', the index of the true one"
            )
        choices, positions = tuple(labels), _positions(labels)
        examples: list[Example] = []
        left_out: Counter[str] = Counter()
        for row in self.rows:
            answer = -1 if row.label is None else positions.get(row.label, -1)
            if answer >= 0 or not labelled:
                examples.append(Example(row.text, choices, answer, row.place))
            elif unknown == "refuse":
                raise DatasetError(
                    f"{row.place}: {shown(row.label)} is not one of the {len(choices)} labels; correct it, or add it to them"
                )
            else:
                left_out[str(row.label)] += 1
        if not examples:
            raise DatasetError(f"{self.name} has no row with one of the {len(choices)} labels, the first is {choices[0]!r}")
        return examples, left_out


def read_rows(source: str | Path, columns: Columns | None = None, *, labelled: bool = True) -> Rows:
    """The rows of a file, a folder of `datasets` or a hub id.

    Args:
        labelled: require a label, or an answer that is one of the choices; otherwise both may be missing, or -1.

    Raises:
        DatasetError: the source cannot be read, is empty, or has an invalid row; the message gives file, line and column.
    """
    columns = columns or Columns()
    read = read_records(source, columns)
    has_labels = not _brings_choices(read.records[0], columns)
    rows = []
    for record in read.records:
        try:
            if _brings_choices(record, columns) == has_labels:
                form = "a label" if has_labels else "'choices' and 'answer'"
                raise ValueError(f"the rows before have {form} and this one does not; give all rows the same form")
            text = columns.text_of(record.values)
            if has_labels:
                rows.append(_Row(text, record.place, _label(record.values, columns, labelled)))
            else:
                choices, answer = _choices(record.values, labelled)
                rows.append(_Row(text, record.place, choices=choices, answer=answer))
        except ValueError as error:
            raise DatasetError(f"{record.place}: {error}") from None
    labels = _labels(read, rows) if has_labels else rows[0].choices or ()
    return Rows(read.name, read.sha256, rows, has_labels, labels)


def read_examples(
    source: str | Path, *, labelled: bool = True, labels: Sequence[str] | None = None, columns: Columns | None = None
) -> list[Example]:
    """The examples of a data set; see `read_rows` and `Rows.examples`. Rows without choices have `labels`, or all their own.

    Raises:
        DatasetError: as for these.
    """
    rows = read_rows(source, columns, labelled=labelled)
    return rows.examples(labels or rows.labels, labelled=labelled)[0]


def ordered(labels: Iterable[str]) -> tuple[str, ...]:
    """Distinct labels in an order that no row's place decides: by number if all are whole numbers, else by character."""
    distinct = set(labels)
    return tuple(sorted(distinct, key=int if all(map(_is_whole, distinct)) else None))


def read_labels(path: Path) -> tuple[str, ...]:
    """The labels of a file, in its order: a JSON list of strings (.json), else one label per line; blank lines are skipped.

    Raises:
        DatasetError: the file cannot be read, or has fewer than two labels, or one twice.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        labels = json.loads(text) if path.suffix.lower() == ".json" else text.split("\n")
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path} cannot be read as labels: {error}; write a JSON list of strings in UTF-8") from None
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise DatasetError(f"{path} must be a JSON list of strings, one for each label")
    labels = [label.removesuffix("\r") for label in labels if label.strip()]
    return check_labels(labels, str(path))


def check_labels(labels: Sequence[str], source: str) -> tuple[str, ...]:
    """The labels, of which there must be two at least, all distinct.

    Raises:
        DatasetError: which label appears twice, or that there are too few. `source` says where they come from.
    """
    if len(labels) < 2:
        raise DatasetError(f"{source}: {len(labels)} label; there must be at least two")
    twice = [label for label, count in Counter(labels).items() if count > 1]
    if twice:
        raise DatasetError(f"{source}: the label {shown(twice[0])} appears twice; remove one")
    return tuple(labels)


def _brings_choices(record: Record, columns: Columns) -> bool:
    return not record.is_text and columns.has_choices(record.values)


def _label(values: Mapping[str, Any], columns: Columns, labelled: bool) -> str | None:
    name = columns.label or "label"
    if not labelled and name not in values:
        return None
    label = columns.label_of(values)
    if label is None and labelled:
        raise ValueError(f"the column {name!r} is empty; write the row's label there, or leave the row out")
    return label


def _choices(values: Mapping[str, Any], labelled: bool) -> tuple[tuple[str, ...], int]:
    choices, answer = values.get("choices"), values.get("answer")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise ValueError("'choices' must be a list of at least two non-empty strings")
    lowest = 0 if labelled else -1
    if not isinstance(answer, int) or isinstance(answer, bool) or not lowest <= answer < len(choices):
        raise ValueError(f"'answer' is {answer!r}; it must be an index from {lowest} to {len(choices) - 1}")
    return tuple(choices), answer


def _labels(read: Records, rows: Sequence[_Row]) -> tuple[str, ...]:
    return read.labels or ordered(row.label for row in rows if row.label is not None)


def _is_whole(label: str) -> bool:
    return len(label) < 20 and label.isascii() and label.removeprefix("-").isdecimal() and str(int(label)) == label


def _positions(labels: Sequence[str]) -> dict[str, int]:
    positions = {label: index for index, label in enumerate(labels)}
    return positions if any(map(_is_whole, labels)) else {str(index): index for index in range(len(labels))} | positions
