"""What is remarkable about examples and likely a mistake, each in one sentence with counts. Nothing is refused here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from scalabl.evaluation.dataset.columns import shown
from scalabl.evaluation.dataset.examples import Example

IMBALANCE = 100  # rows of the largest class for each row of the smallest
LISTED = 5  # labels that a sentence names
LONGEST_COMPARED = 26  # choices of a row that are compared with another's


def unknown_labels(name: str, left_out: Mapping[str, int], source: str) -> str | None:
    """That rows were left out because their labels are not among the choices. `source` says where the choices come from."""
    if not left_out:
        return None
    counts = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    return (
        f"{_rows(sum(left_out.values()))} of {name} left out: {_labels(len(left_out))} not among the choices of {source} "
        f"({_some([f'{shown(label)}: {count}' for label, count in counts])}); correct these labels, or score such rows as "
        "out-of-distribution inputs"
    )


def empty_classes(name: str, choices: Sequence[str], examples: Sequence[Example]) -> str | None:
    """That choices have no rows. Only for examples that all have the same choices."""
    counts = Counter(example.answer for example in examples)
    empty = [choice for index, choice in enumerate(choices) if index not in counts]
    if not empty:
        return None
    verb = "has" if len(empty) == 1 else "have"
    return f"{len(empty)} of {len(choices)} choices {verb} no row in {name}: {_some(map(shown, empty))}"


def imbalance(name: str, choices: Sequence[str], examples: Sequence[Example]) -> str | None:
    """That the largest class has more than `IMBALANCE` times as many rows as the smallest that has any."""
    counts = Counter(example.answer for example in examples if example.answer >= 0)
    if not counts:
        return None
    largest, smallest = max(counts, key=lambda i: counts[i]), min(counts, key=lambda i: counts[i])
    if counts[largest] <= IMBALANCE * counts[smallest]:
        return None
    return (
        f"the classes of {name} are very uneven: {counts[largest]} rows of {shown(choices[largest])}, {counts[smallest]} of "
        f"{shown(choices[smallest])}, a ratio of {counts[largest] / counts[smallest]:.0f} to 1; the small ones may never be "
        "predicted"
    )


def shared_texts(name: str, examples: Sequence[Example], other_name: str, others: Sequence[Example]) -> str | None:
    """That texts of one set are also in another, so that scores on it are too good."""
    answers = {_key(example): _answer(example) for example in others}
    shared = [example for example in examples if _key(example) in answers]
    if not shared:
        return None
    contrary = sum(_answer(example) != answers[_key(example)] for example in shared)
    note = f", {contrary} of them with another label" if contrary else ""
    verb = "has" if len(shared) == 1 else "have"
    return f"{_rows(len(shared))} of the {len(examples)} of {name} {verb} a text that is also in {other_name}{note}"


def repeated_texts(name: str, examples: Sequence[Example]) -> str | None:
    """That texts are repeated within a set that is split at random, so that its parts are not independent."""
    counts = Counter(map(_key, examples))
    repeats = sum(counts.values()) - len(counts)
    if not repeats:
        return None
    verb = "repeats" if repeats == 1 else "repeat"
    return (
        f"{_rows(repeats)} of the {len(examples)} of {name} {verb} the text of an earlier row; each text must be there once"
    )


def _key(example: Example) -> tuple[object, ...]:
    # In multiple choice the same question may stand with other choices. Long lists of choices are a classification's.
    return example.text, example.choices if len(example.choices) <= LONGEST_COMPARED else ()


def _answer(example: Example) -> str | None:
    return example.choices[example.answer] if example.answer >= 0 else None


def _rows(count: int) -> str:
    return f"{count} row" if count == 1 else f"{count} rows"


def _labels(count: int) -> str:
    return f"{count} label is" if count == 1 else f"{count} labels are"


def _some(items: Iterable[str]) -> str:
    items = list(items)
    return ", ".join(items[:LISTED]) + (f", and {len(items) - LISTED} more" if len(items) > LISTED else "")
