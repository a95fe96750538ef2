"""Which columns of a row hold its text and its label, and the checks of their values. Files are read in `sources`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from scalabl.errors import PromptError
from scalabl.prompt import check_text

SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True)
class Columns:
    """The names of the columns to read.

    Attributes:
        texts: the columns of the text, joined by an empty line in this order. Empty: `text`, or else `question`, and before
            it `context` if the row has one.
        label: the column of the label. None: `label`, unless the row has `choices` and `answer`.
    """

    texts: tuple[str, ...] = ()
    label: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The columns that may be read. Columnar files need not read others."""
        label = self.label or "label"
        return (*self.texts, label) if self.texts else ("text", "question", "context", "choices", "answer", label)

    def text_of(self, row: Mapping[str, Any]) -> str:
        """The text of a row.

        Raises:
            ValueError: a column is missing, or has no text; the message names the column and the remedy.
        """
        if self.texts:
            return "\n\n".join(_text(row, name, "--text-column") for name in self.texts)
        name = "text" if "text" in row else "question"
        if name not in row:
            raise ValueError(
                f"the row needs a string under 'text' or 'question'; its columns are {listed(row)}: "
                "name the one that holds the text with --text-column"
            )
        text = _text(row, name, "--text-column")
        return text if row.get("context") is None else f"{_text(row, 'context', '--text-column')}\n\n{text}"

    def has_choices(self, row: Mapping[str, Any]) -> bool:
        """Whether a row brings its own choices, under `choices` and `answer`."""
        return self.label is None and ("choices" in row or "answer" in row)

    def label_of(self, row: Mapping[str, Any]) -> str | None:
        """The label of a row as text; None if it has none, which means that no choice applies.

        Raises:
            ValueError: the column is missing from the row, or its value is neither text nor a whole number.
        """
        name = self.label or "label"
        if name not in row:
            raise ValueError(
                f"the row has no column {name!r}; its columns are {listed(row)}: "
                "name the one that holds the label with --label-column"
            )
        value = row[name]
        if value is None or value == "":
            return None
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise ValueError(
                f"the column {name!r} is {shown(value)}; a label must be a string or a whole number, so write it as text"
            )
        label = str(value)
        _check(name, label)
        return label


def _text(row: Mapping[str, Any], name: str, option: str) -> str:
    if name not in row:
        raise ValueError(f"the row has no column {name!r}; its columns are {listed(row)}: name another one with {option}")
    value = row[name]
    if not isinstance(value, str):
        raise ValueError(
            f"the row needs a string under {name!r}, which is {shown(value)}; write it as text, or leave the row out"
        )
    _check(name, value)
    return value


def _check(name: str, value: str) -> None:
    try:
        check_text(name, value)
    except PromptError as error:
        raise ValueError(f"the column {name!r}: {error.message}") from None


def shown(value: object) -> str:
    """A value on one line of a message, cut if it is long."""
    text = "null" if value is None else repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


def listed(names: Iterable[str]) -> str:
    """The names of columns, for a message."""
    names = list(names)
    return ", ".join(names[:20]) + (f", … ({len(names)} in all)" if len(names) > 20 else "") if names else "none"
