"""Rows become examples: each is checked, and a bad one is reported with its file, line and column and with the remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scalabl.errors import DatasetError
from scalabl.evaluation.dataset import Columns, read_examples
from scalabl.evaluation.dataset.examples import check_labels, ordered, read_labels, read_rows

ROW: dict[str, Any] = {"text": "hello", "choices": ["a", "b"], "answer": 1}


def _write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_rows_are_read_in_order_and_blank_lines_skipped(tmp_path: Path) -> None:
    path = _write(tmp_path / "rows.jsonl", ROW, "", {"question": "why", "context": "because", **ROW} | {"text": "then"})
    first, second = read_examples(path)
    assert (first.text, first.choices, first.answer) == ("hello", ("a", "b"), 1)
    assert second.text == "because\n\nthen"
    assert second.source == f"{path}:3"


def test_a_question_stands_for_a_text(tmp_path: Path) -> None:
    (row,) = read_examples(_write(tmp_path / "rows.jsonl", {"question": "why", "choices": ["a", "b"], "answer": 0}))
    assert row.text == "why"


def test_unicode_line_separators_do_not_split_rows(tmp_path: Path) -> None:
    (row,) = read_examples(_write(tmp_path / "rows.jsonl", json.dumps(ROW | {"text": "a\u2028b\x85c"}, ensure_ascii=False)))
    assert row.text == "a\u2028b\x85c"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "Expecting property name"),
        ("[]", "the row is not a JSON object"),
        ({"choices": ["a", "b"], "answer": 0}, "needs a string under 'text' or 'question'"),
        (ROW | {"text": 3}, "needs a string under 'text', which is 3"),
        (ROW | {"text": " \n"}, "the column 'text': the text is empty"),
        (ROW | {"text": "\ud800"}, "the column 'text': the text is not valid Unicode"),
        (ROW | {"context": 3}, "needs a string under 'context', which is 3"),
        ("[" * 3000 + "]" * 3000, "the row is (not a JSON object|nested too deeply)"),
        ('{"text": ' + "[" * 3000, "nested too deeply|Expecting value"),
        ('{"a":' * 3000 + "1" + "}" * 3000, "nested too deeply|needs a string under 'text'"),
        ({"text": "hello", "label": "a"}, "the rows before have 'choices' and 'answer' and this one does not"),
        (ROW | {"choices": ["a"]}, "'choices' must be a list of at least two"),
        (ROW | {"choices": ["a", ""]}, "'choices' must be a list of at least two"),
        (ROW | {"answer": 2}, "'answer' is 2; it must be an index from 0 to 1"),
        (ROW | {"answer": -1}, "'answer' is -1; it must be an index from 0 to 1"),
        (ROW | {"answer": True}, "'answer' is True"),
        (ROW | {"answer": "b"}, "'answer' is 'b'"),
    ],
)
def test_a_bad_row_is_reported_with_file_and_line(row: Any, message: str, tmp_path: Path) -> None:
    path = _write(tmp_path / "rows.jsonl", ROW, row)
    with pytest.raises(DatasetError, match=rf"rows\.jsonl:2: .*{message}"):
        read_examples(path)


def test_none_of_the_choices_is_an_answer_only_where_it_may_be(tmp_path: Path) -> None:
    path = _write(tmp_path / "rows.jsonl", ROW | {"answer": -1})
    assert read_examples(path, labelled=False)[0].answer == -1


def test_a_file_without_rows_or_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"empty\.jsonl has no rows"):
        read_examples(_write(tmp_path / "empty.jsonl", ""))
    with pytest.raises(DatasetError, match=r"absent\.jsonl cannot be read: No such file"):
        read_examples(tmp_path / "absent.jsonl")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DatasetError, match=r"binary\.jsonl:1: .*utf-8.*; save the file as UTF-8"):
        read_examples(tmp_path / "binary.jsonl")


LABELLED: dict[str, Any] = {"text": "hello", "label": "b"}


def test_labels_are_names_and_the_choices_are_all_of_them_in_order(tmp_path: Path) -> None:
    rows = [{"text": "1", "label": "b, and c"}, {"text": "2", "label": "a"}, {"text": "3", "label": "B"}]
    examples = read_examples(_write(tmp_path / "rows.jsonl", *rows))
    assert {row.choices for row in examples} == {("B", "a", "b, and c")}
    assert [row.answer for row in examples] == [2, 1, 0]


def test_whole_numbers_are_names_in_the_order_of_numbers(tmp_path: Path) -> None:
    rows = [{"text": "x", "label": label} for label in (10, 9, 0, "2")]
    examples = read_examples(_write(tmp_path / "rows.jsonl", *rows))
    assert examples[0].choices == ("0", "2", "9", "10")
    assert [row.answer for row in examples] == [3, 2, 0, 1]
    assert ordered(["10", "9", "x"]) == ("10", "9", "x")
    assert ordered(["07", "7"]) == ("07", "7")


def test_a_whole_number_is_the_position_of_a_label_unless_a_label_is_a_number(tmp_path: Path) -> None:
    path = _write(tmp_path / "rows.jsonl", *({"text": "x", "label": label} for label in (2, "0", "red")))
    assert [row.answer for row in read_examples(path, labels=("red", "green", "blue"))] == [2, 0, 0]
    with pytest.raises(DatasetError, match=r"rows\.jsonl:2: '0' is not one of the 3 labels"):
        read_examples(path, labels=("red", "1", "2"))


def test_a_label_that_is_not_among_the_choices_is_refused_or_left_out_with_a_count(tmp_path: Path) -> None:
    labels = ["a", "x", "b", "x", "y"]
    rows = read_rows(_write(tmp_path / "rows.jsonl", *({"text": "t", "label": label} for label in labels)))
    with pytest.raises(DatasetError, match=r"rows\.jsonl:2: 'x' is not one of the 2 labels; correct it, or add it"):
        rows.examples(("a", "b"))
    examples, left_out = rows.examples(("a", "b"), unknown="leave out")
    assert [(row.answer, row.source.rpartition(":")[2]) for row in examples] == [(0, "1"), (1, "3")]
    assert left_out == {"x": 2, "y": 1}
    with pytest.raises(DatasetError, match="has no row with one of the 2 labels, the first is 'c'"):
        rows.examples(("c", "d"), unknown="leave out")
    with pytest.raises(DatasetError, match=r"rows\.jsonl:1: the row has a label, and multiple choice needs 'choices'"):
        rows.examples(None)


def test_inputs_to_which_no_choice_applies_need_no_label(tmp_path: Path) -> None:
    rows = [{"text": "1", "label": None}, {"text": "2"}, {"text": "3", "label": "x"}, {"text": "4", "label": "b"}]
    path = _write(tmp_path / "rows.jsonl", *rows)
    assert [row.answer for row in read_examples(path, labelled=False, labels=("a", "b"))] == [-1, -1, -1, 1]
    with pytest.raises(DatasetError, match=r"rows\.jsonl:1: the column 'label' is empty; write the row's label there"):
        read_examples(path, labels=("a", "b"))


def test_columns_have_the_names_that_are_given(tmp_path: Path) -> None:
    row = {"premise": "it rains", "hypothesis": "it is wet", "gold": 1, "label": 3, "answer": 0, "choices": ["x"]}
    path = _write(tmp_path / "rows.jsonl", row)
    (example,) = read_examples(path, labels=("no", "yes"), columns=Columns(("premise", "hypothesis"), "gold"))
    assert (example.text, example.answer) == ("it rains\n\nit is wet", 1)


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        ({"sentence": "x", "label": "a"}, Columns(), "its columns are sentence, label: name .* with --text-column"),
        (
            {"text": "x", "gold": "a"},
            Columns(),
            "no column 'label'; its columns are text, gold: name .* with --label-column",
        ),
        (LABELLED, Columns(("premise",)), "the row has no column 'premise'; its columns are text, label: name another"),
        (LABELLED | {"text": None}, Columns(), "needs a string under 'text', which is null; write it as text, or leave"),
        (LABELLED | {"label": True}, Columns(), "the column 'label' is True; a label must be a string or a whole number"),
        (LABELLED | {"label": 1.0}, Columns(), "the column 'label' is 1.0; a label must be a string or a whole number"),
        (LABELLED | {"label": ["a"]}, Columns(), r"the column 'label' is \['a'\]; a label must"),
        (LABELLED | {"label": " "}, Columns(), "the column 'label': the text is empty"),
        (LABELLED | {"label": "\ud800"}, Columns(), "the column 'label': the text is not valid Unicode"),
        (ROW, Columns(), "the rows before have a label and this one does not"),
    ],
)
def test_a_bad_labelled_row_is_reported_with_the_column_and_the_remedy(
    row: Any, columns: Columns, message: str, tmp_path: Path
) -> None:
    good = LABELLED | {"premise": "x", "gold": "a"}
    with pytest.raises(DatasetError, match=rf"rows\.jsonl:2: .*{message}"):
        read_examples(_write(tmp_path / "rows.jsonl", good, row), columns=columns)


def test_labels_are_read_from_a_file_and_never_split(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_bytes(b"\xef\xbb\xbfFood, drink\r\n\r\nSports\r\n")
    assert read_labels(tmp_path / "labels.txt") == ("Food, drink", "Sports")
    (tmp_path / "labels.json").write_text('["b\\nc", "a"]')
    assert read_labels(tmp_path / "labels.json") == ("b\nc", "a")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("labels.txt", "a\nb\na\n", "the label 'a' appears twice; remove one"),
        ("labels.txt", "a\n", "1 label; there must be at least two"),
        ("labels.json", '{"a": 1}', "must be a JSON list of strings"),
        ("labels.json", "[1, 2]", "must be a JSON list of strings"),
        ("labels.json", "[", "cannot be read as labels"),
        ("labels.json", "[" * 100_000, "cannot be read as labels"),
    ],
)
def test_a_bad_file_of_labels_is_refused(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DatasetError, match=message):
        read_labels(tmp_path / name)
    with pytest.raises(DatasetError, match=r"none\.txt cannot be read: No such file"):
        read_labels(tmp_path / "none.txt")
    with pytest.raises(DatasetError, match="--label: 1 label; there must be at least two"):
        check_labels(["a"], "--label")
