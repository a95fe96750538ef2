"""What is likely a mistake in a data set is said in one sentence each, with counts, and nothing else is said."""

from __future__ import annotations

from collections.abc import Sequence

from scalabl.evaluation.dataset import Example, review

CHOICES = ("red", "green", "blue")


def _examples(*answers: int, texts: Sequence[str] | None = None) -> list[Example]:
    return [Example(texts[i] if texts else f"text {i}", CHOICES, answer, f"rows:{i}") for i, answer in enumerate(answers)]


def test_labels_that_were_left_out_are_counted() -> None:
    assert review.unknown_labels("a/b.csv", {}, "the adapter") is None
    sentence = review.unknown_labels("a/b.csv", {"x": 1, "y, z": 3}, "the adapter")
    assert sentence is not None
    assert sentence.startswith(
        "4 rows of a/b.csv left out: 2 labels are not among the choices of the adapter ('y, z': 3, 'x': 1)"
    )
    many = review.unknown_labels("a/b.csv", {str(n): 1 for n in range(7)}, "the adapter")
    assert many is not None
    assert "'4': 1, and 2 more)" in many


def test_classes_without_rows_are_named() -> None:
    assert review.empty_classes("a", CHOICES, _examples(0, 1, 2)) is None
    assert review.empty_classes("a", CHOICES, _examples(1, 1)) == "2 of 3 choices have no row in a: 'red', 'blue'"


def test_an_imbalance_is_said_above_100_to_1() -> None:
    assert review.imbalance("a", CHOICES, _examples(*[0] * 100, 1)) is None
    sentence = review.imbalance("a", CHOICES, _examples(*[0] * 101, 1))
    assert sentence is not None
    assert "101 rows of 'red', 1 of 'green', a ratio of 101 to 1" in sentence
    assert review.imbalance("a", CHOICES, _examples(-1)) is None


def test_texts_in_two_sets_are_counted_with_contrary_labels() -> None:
    train = _examples(0, 1, 2, texts=["a", "b", "c"])
    assert review.shared_texts("v", _examples(0, texts=["d"]), "t", train) is None
    assert review.shared_texts("v", _examples(0, 1, texts=["d", "a"]), "t", train) == (
        "1 row of the 2 of v has a text that is also in t, 1 of them with another label"
    )
    assert review.shared_texts("v", _examples(0, 1, texts=["a", "b"]), "t", train) == (
        "2 rows of the 2 of v have a text that is also in t"
    )


def test_a_question_with_other_choices_is_another_one() -> None:
    first, second = (Example("which", choices, 0, "rows:1") for choices in (("a", "b"), ("c", "d")))
    assert review.shared_texts("v", [first], "t", [second]) is None


def test_repeats_within_a_set_are_counted() -> None:
    assert review.repeated_texts("a", _examples(0, 1)) is None
    sentence = review.repeated_texts("a", _examples(0, 1, 1, texts=["x", "x", "x"]))
    assert sentence == "2 rows of the 3 of a repeat the text of an earlier row; each text must be there once"
