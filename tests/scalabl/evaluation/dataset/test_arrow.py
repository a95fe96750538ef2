"""Parquet files and data sets of Hugging Face, where the packages for them are installed; else the remedy is named."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from scalabl.errors import DatasetError
from scalabl.evaluation.dataset import Columns, arrow
from scalabl.evaluation.dataset.examples import read_rows

needs_pyarrow = pytest.mark.skipif(find_spec("pyarrow") is None, reason="pyarrow is not installed (extra 'parquet')")
needs_datasets = pytest.mark.skipif(find_spec("datasets") is None, reason="datasets is not installed (extra 'datasets')")
ROWS: dict[str, list[Any]] = {"sentence": ["x", "y", "z"], "idx": [1, 2, 3], "label": [1, 0, 1]}


def _parquet(path: Path, columns: dict[str, list[Any]], metadata: dict[str, str] | None = None) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns).replace_schema_metadata(metadata), path)
    return path


@needs_pyarrow
def test_a_parquet_file_is_read_and_its_columns_are_named(tmp_path: Path) -> None:
    rows = read_rows(_parquet(tmp_path / "rows.parquet", ROWS), Columns(("sentence",)))
    assert (rows.labels, rows.name) == (("0", "1"), f"{tmp_path.name}/rows.parquet")
    examples, _ = rows.examples(("no", "yes"))
    assert [(row.text, row.answer) for row in examples] == [("x", 1), ("y", 0), ("z", 1)]
    assert examples[2].source == f"{tmp_path / 'rows.parquet'}:3"


@needs_pyarrow
def test_a_parquet_file_may_say_what_its_labels_are_called(tmp_path: Path) -> None:
    features = '{"info": {"features": {"label": {"names": ["yes", "no", "maybe"], "_type": "ClassLabel"}}}}'
    columns = ROWS | {"label": [1, 0, 0]}
    rows = read_rows(_parquet(tmp_path / "rows.parquet", columns, {"huggingface": features}), Columns(("sentence",)))
    assert rows.labels == ("yes", "no", "maybe")
    examples, _ = rows.examples(("maybe", "no", "yes"))
    assert [row.answer for row in examples] == [1, 2, 2]


@needs_pyarrow
def test_rows_that_bring_choices_may_be_parquet_too(tmp_path: Path) -> None:
    columns: dict[str, list[Any]] = {"question": ["why"], "choices": [["a", "b"]], "answer": [1]}
    (example,), _ = read_rows(_parquet(tmp_path / "rows.parquet", columns)).examples(None)
    assert (example.text, example.choices, example.answer) == ("why", ("a", "b"), 1)


@needs_pyarrow
@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"a": ["x"], "b": ["y"]}, r"has none of the columns text, question.*; its columns are a, b: name them"),
        ({"text": ["x", None], "label": ["a", "b"]}, r"parquet:2: .*'text', which is null"),
        ({"text": ["x"], "label": [1.0]}, r"parquet:1: the column 'label' is 1.0; a label must be"),
    ],
)
def test_a_bad_parquet_file_is_refused_with_row_and_column(columns: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=message):
        read_rows(_parquet(tmp_path / "rows.parquet", columns))


@needs_pyarrow
def test_a_file_that_is_not_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").write_text("text,label")
    with pytest.raises(DatasetError, match=r"rows\.parquet cannot be read as a Parquet file"):
        read_rows(tmp_path / "rows.parquet")


@needs_datasets
@pytest.mark.filterwarnings("ignore")  # of datasets and what it imports
def test_a_saved_data_set_is_read_by_its_split(tmp_path: Path) -> None:
    import datasets

    names = datasets.Features(
        {
            "sentence": datasets.Value("string"),
            "idx": datasets.Value("int64"),
            "label": datasets.ClassLabel(names=["b", "a"]),
        }
    )
    table = datasets.Dataset.from_dict(ROWS | {"label": [1, 0, -1]}, features=names)
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(tmp_path / "set")
    columns = Columns(("sentence",))
    rows = read_rows(f"{tmp_path / 'set'}:test", columns)
    assert (rows.name, rows.labels, len(rows.rows)) == (f"{tmp_path / 'set'}:test", ("b", "a"), 1)
    everything = read_rows(f"{tmp_path / 'set'}:train", columns, labelled=False).examples(("b", "a"), labelled=False)[0]
    assert [(row.text, row.answer) for row in everything] == [("x", 1), ("y", 0), ("z", -1)]
    assert read_rows(f"{tmp_path / 'set'}:train", columns, labelled=False).sha256 != rows.sha256
    with pytest.raises(DatasetError, match=r"set has several splits; write .*set:SPLIT with one of train, test"):
        read_rows(str(tmp_path / "set"), columns)
    with pytest.raises(DatasetError, match=r"set has no split 'dev'; write"):
        read_rows(f"{tmp_path / 'set'}:dev", columns)
    table.save_to_disk(tmp_path / "one")
    assert len(read_rows(str(tmp_path / "one"), columns, labelled=False).rows) == 3


@needs_datasets
@pytest.mark.filterwarnings("ignore")
def test_a_hub_id_that_cannot_be_reached_is_one_line() -> None:
    with pytest.raises(
        DatasetError, match="org/none cannot be loaded with datasets; no file has that name, so it was"
    ) as error:
        read_rows("org/none:train")
    assert "\n" not in str(error.value)


def test_a_missing_package_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow, "find_spec", lambda name: None)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    with pytest.raises(DatasetError, match=r"rows\.parquet: this needs the package pyarrow; .* 'scalabl\[parquet\]'"):
        read_rows(tmp_path / "rows.parquet")
    with pytest.raises(DatasetError, match=r"no file has that name, .* hub id; this needs the package datasets"):
        read_rows("org/name:train")


def test_a_folder_that_is_no_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"is a folder without dataset_dict\.json, .*; name a file, or what save_to_disk"):
        read_rows(str(tmp_path))
