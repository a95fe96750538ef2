"""What a data set's name stands for, and its records, each with its place: JSONL files and tables as text.

Parquet files and data sets of Hugging Face are in `arrow`. What a record means is decided in `columns` and `examples`.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scalabl.errors import DatasetError
from scalabl.evaluation.dataset import arrow
from scalabl.evaluation.dataset.columns import Columns, listed

DELIMITERS = {".csv": ",", ".tsv": "\t"}
LONGEST_CELL = 2**27  # characters; Python's own limit, 131072, is shorter than some documents


@dataclass(frozen=True)
class Record:
    """A row as it stands in its source.

    Attributes:
        place: where it is, as `name:line` of a text file, or `name:row`, both counted from 1.
        is_text: whether all values are text because the format has no other types.
    """

    values: Mapping[str, Any]
    place: str
    is_text: bool = False


@dataclass(frozen=True)
class Records:
    """The records of one data set.

    Attributes:
        name: its name in messages and reports: folder and file, or the hub id.
        sha256: of the file, or of the records if it is not one file.
        labels: the names of all labels, if the source declares them; the labels of its records are then names.
    """

    name: str
    sha256: str
    records: list[Record] = field(repr=False)
    labels: tuple[str, ...] | None = None


def read_records(source: str | Path, columns: Columns) -> Records:
    """The records of a file (by its suffix: .csv, .tsv, .parquet, else JSONL), a folder of `datasets`, or a hub id.

    Raises:
        DatasetError: the source cannot be read or is empty, or needs a package that is not installed.
    """
    path = Path(source)
    if not path.is_file():
        table = arrow.read_datasets(str(source), columns.names)
        if table is None:
            raise DatasetError(f"{source} cannot be read: No such file or folder")
        return _of_table(str(source), str(source), None, table)
    name = f"{path.resolve().parent.name}/{path.name}"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}") from None
    sha256 = hashlib.sha256(content).hexdigest()
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _of_table(name, str(path), sha256, arrow.read_parquet(path, columns.names))
    content = content.removeprefix(codecs.BOM_UTF8)
    records = list(_table(content, path, DELIMITERS[suffix]) if suffix in DELIMITERS else _json_lines(content, path))
    if not records:
        raise DatasetError(f"{path} has no rows; it needs at least one")
    return Records(name, sha256, records)


def _of_table(name: str, place: str, sha256: str | None, table: arrow.Table) -> Records:
    records = [Record(row, f"{place}:{number}") for number, row in enumerate(table.rows, start=1)]
    if not records:
        raise DatasetError(f"{place} has no rows; it needs at least one")
    if sha256 is None:
        text = json.dumps([record.values for record in records], sort_keys=True, default=str)
        sha256 = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return Records(name, sha256, records, table.labels)


def _json_lines(content: bytes, path: Path) -> Iterator[Record]:
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DatasetError(f"{place}: {error}; save the file as UTF-8") from None
        except ValueError as error:
            raise DatasetError(f"{place}: {error}; each line must be one JSON object") from None
        except RecursionError:
            raise DatasetError(f"{place}: the row is nested too deeply; it needs a text and a label only") from None
        if not isinstance(row, dict):
            raise DatasetError(f"{place}: the row is not a JSON object; each line must be one")
        yield Record(row, place)


def _table(content: bytes, path: Path, delimiter: str) -> Iterator[Record]:
    """The rows of a table whose first row names the columns. A cell may be quoted, and then have several lines."""
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DatasetError(f"{path}:{line}: {error}; save the file as UTF-8") from None
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DatasetError(
                f"{path}:{line}: {error}; put a cell that has quotes, line breaks or the delimiter in double quotes, "
                'and write a quote inside it as ""'
            ) from None
        if not any(cell.strip() for cell in cells):
            continue
        if header is None:
            header = _header(cells, f"{path}:{line}")
        elif len(cells) != len(header):
            column = f"the first without a value is {header[len(cells)]!r}" if len(cells) < len(header) else "there are more"
            raise DatasetError(
                f"{path}:{line}: the row has {len(cells)} cells for {len(header)} columns ({listed(header)}), {column}; "
                "put a cell that has the delimiter in double quotes"
            )
        else:
            yield Record(dict(zip(header, cells, strict=True)), f"{path}:{line}", is_text=True)


def _header(cells: list[str], place: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    repeated = [name for index, name in enumerate(names) if name in names[:index]]
    if repeated:
        raise DatasetError(f"{place}: two columns have the name {repeated[0]!r}; rename one")
    return names
