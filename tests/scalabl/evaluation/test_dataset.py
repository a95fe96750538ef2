"""Data files: each row is checked, and a bad one is reported with its file and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from scalabl.errors import DatasetError
from scalabl.evaluation.dataset import read_examples

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
        (ROW | {"text": 3}, "needs a string under 'text' or 'question'"),
        (ROW | {"text": " \n"}, "text: the text is empty"),
        (ROW | {"text": "\ud800"}, "text: the text is not valid Unicode"),
        (ROW | {"context": 3}, "'context' must be a string"),
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
    with pytest.raises(DatasetError, match=r"binary\.jsonl:1: .*utf-8"):
        read_examples(tmp_path / "binary.jsonl")
