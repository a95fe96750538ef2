"""What people have as files is read: a byte order mark, CRLF, blank lines, quoted cells. An error names the line."""

from __future__ import annotations

from pathlib import Path

import pytest

from scalabl.errors import DatasetError
from scalabl.evaluation.dataset import read_examples
from scalabl.evaluation.dataset.examples import read_rows

BOM = b"\xef\xbb\xbf"


def _file(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_jsonl_may_have_a_byte_order_mark_crlf_and_blank_lines(tmp_path: Path) -> None:
    content = BOM + b'{"text": "x", "label": "a"}\r\n\r\n  \r\n{"text": "y", "label": "b"}\r\n'
    path = _file(tmp_path / "rows.jsonl", content)
    first, second = read_examples(path)
    assert (first.text, first.answer, second.text, second.source) == ("x", 0, "y", f"{path}:4")


@pytest.mark.parametrize(("suffix", "delimiter"), [(".csv", b","), (".tsv", b"\t"), (".CSV", b",")])
def test_a_table_is_read_with_its_quoted_cells(suffix: str, delimiter: bytes, tmp_path: Path) -> None:
    lines = [BOM + b"id,text,label", b"", b'7,"one, ""two""\r\nthree",a', b" , ,", b"8,\xc3\xa9,b;c", b""]
    content = b"\r\n".join(lines).replace(b",", delimiter)
    path = _file(tmp_path / f"rows{suffix}", content)
    first, second = read_examples(path)
    assert first.text == 'one, "two"\r\nthree'.replace(",", delimiter.decode())
    assert (first.source, first.choices, first.answer) == (f"{path}:3", ("a", "b;c"), 0)
    assert (second.text, second.source, second.answer) == ("é", f"{path}:6", 1)


def test_columns_called_choices_and_answer_are_ordinary_ones_in_a_table(tmp_path: Path) -> None:
    path = _file(tmp_path / "rows.csv", b"text,label,answer,choices\nx,a,0,2\ny,b,0,2\n")
    assert [row.answer for row in read_examples(path)] == [0, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"text,label\nx,a\nx,y,b\n",
            r"csv:3: the row has 3 cells for 2 columns \(text, label\), there are more; put a cell",
        ),
        (b"text,label\nx\n", r"csv:2: the row has 1 cells for 2 columns .*, the first without a value is 'label'"),
        (b'text,label\n"x" y,a\n', r"csv:2: .*expected after.*; put a cell that has quotes"),
        (b'text,label\nx,a\n"x,a\ny,b\n', r"csv:3: unexpected end of data; put a cell that has quotes"),
        (b"text,text\nx,a\n", r"csv:1: two columns have the name 'text'; rename one"),
        (b"sentence,label\nx,a\n", r"csv:2: .*its columns are sentence, label: name the one .* with --text-column"),
        (b"text,answer\nx,a\n", r"csv:2: the row has no column 'label'; its columns are text, answer: name"),
        (b"text,label\n ,a\n", r"csv:2: the column 'text': the text is empty"),
        (b"text,label\nx,\n", r"csv:2: the column 'label' is empty"),
        (b"text,label\nx,a\n\xff,b\n", r"csv:3: .*utf-8.*; save the file as UTF-8"),
        (b"text,label\n", "csv has no rows; it needs at least one"),
        (b"", "csv has no rows; it needs at least one"),
    ],
)
def test_a_bad_table_is_reported_with_line_and_remedy(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=message):
        read_examples(_file(tmp_path / "rows.csv", content))


def test_a_cell_may_be_as_long_as_a_document(tmp_path: Path) -> None:
    content = b"text,label\n" + b"x" * 300_000 + b",a\ny,b\n"
    assert len(read_examples(_file(tmp_path / "rows.csv", content))[0].text) == 300_000


def test_a_file_is_known_by_its_bytes_and_by_its_folder(tmp_path: Path) -> None:
    first = read_rows(_file(tmp_path / "a.csv", b"text,label\nx,a\ny,b\n"))
    second = read_rows(_file(tmp_path / "b.csv", b"text,label\nx,a\ny,c\n"))
    assert first.name == f"{tmp_path.name}/a.csv"
    assert len({first.sha256, second.sha256}) == 2


@pytest.mark.parametrize("name", ["none.jsonl", "none.parquet", "no such set", "folder/none.csv"])
def test_a_name_of_nothing_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=rf"{name} cannot be read: No such file or folder"):
        read_rows(str(tmp_path / name))
