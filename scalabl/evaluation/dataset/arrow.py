"""Rows of Parquet files and of Hugging Face data sets, with packages that are installed as extras.

A data set is a folder that `save_to_disk` wrote, or a hub id, both with `:split` after it: `org/name:train`, or
`org/name/configuration:train`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from scalabl.errors import DatasetError
from scalabl.evaluation.dataset.columns import listed

SAVED_FILES = ("dataset_dict.json", "dataset_info.json", "state.json")  # what `save_to_disk` writes
FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")  # names that end so are files, which may be missing
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+){1,2}")
NO_LABEL = -1  # what `datasets` stores where a label is missing


@dataclass(frozen=True)
class Table:
    """Rows by column; `labels` are the names of the labels if the table declares them."""

    rows: list[dict[str, Any]]
    labels: tuple[str, ...] | None = None


def read_parquet(path: Path, columns: Sequence[str]) -> Table:
    """The rows of a Parquet file, of which only these columns are read.

    Raises:
        DatasetError: pyarrow is not installed, the file is not a Parquet file, or it has none of the columns.
    """
    _need("pyarrow", "parquet", str(path))
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            present = _present(columns, schema.names, str(path))
            rows = file.read(columns=present).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DatasetError(f"{path} cannot be read as a Parquet file: {error}") from None
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = metadata.get("info", {}).get("features", {})
    return _named(rows, columns[-1], features.get(columns[-1], {}).get("names"))


def read_datasets(source: str, columns: Sequence[str]) -> Table | None:
    """The rows of a folder that `save_to_disk` wrote, or of a data set of a hub. None if the name is neither.

    Raises:
        DatasetError: `datasets` is not installed, or it cannot be loaded, or no split is named of several.
    """
    place, split = source, ""
    if ":" in source and not Path(source).is_dir():
        place, _, split = source.rpartition(":")
    folder = Path(place)
    is_saved = any((folder / name).is_file() for name in SAVED_FILES)
    if folder.is_dir() and not is_saved:
        raise DatasetError(f"{place} is a folder without {listed(SAVED_FILES)}; name a file, or what save_to_disk wrote")
    if not is_saved and (not HUB_ID.fullmatch(place) or folder.suffix.lower() in FILES):
        return None
    _need("datasets", "datasets", source, "" if is_saved else "no file has that name, so it was read as a hub id; ")
    import datasets

    try:
        if is_saved:
            loaded = datasets.load_from_disk(place)
        else:
            parts = place.split("/")
            loaded = datasets.load_dataset("/".join(parts[:2]), *parts[2:])
    except Exception as error:  # what it raises depends on the hub, the network and the format of the data set
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        hint = "" if is_saved else "; no file has that name, so it was looked up as a hub id"
        raise DatasetError(f"{place} cannot be loaded with datasets{hint}: {first}") from None
    table = _split(loaded, split, place)
    present = _present(columns, table.column_names, source)
    feature = table.features.get(columns[-1])
    rows = table.select_columns(present).with_format(None).to_list()
    return _named(rows, columns[-1], getattr(feature, "names", None))


def _split(loaded: Any, split: str, place: str) -> Any:
    """The wanted split of a loaded data set, which may have one table or several."""
    if not isinstance(loaded, dict):
        if split:
            raise DatasetError(f"{place} has no splits; leave out ':{split}'")
        return loaded
    if not split and len(loaded) == 1:
        return next(iter(loaded.values()))
    if split not in loaded:
        wanted = f"has no split {split!r}" if split else "has several splits"
        raise DatasetError(f"{place} {wanted}; write {place}:SPLIT with one of {listed(loaded)}")
    return loaded[split]


def _present(columns: Sequence[str], names: Iterable[str], source: str) -> list[str]:
    names = list(names)
    present = [name for name in dict.fromkeys(columns) if name in names]
    if not present:
        raise DatasetError(
            f"{source} has none of the columns {listed(dict.fromkeys(columns))}; its columns are {listed(names)}: "
            "name them with --text-column and --label-column"
        )
    return present


def _named(rows: list[dict[str, Any]], label: str, names: Sequence[str] | None) -> Table:
    """The rows with the names of their labels, if the table declares names."""
    if names is None:
        return Table(rows)
    for row in rows:
        number = row.get(label)
        if isinstance(number, int):
            row[label] = None if number == NO_LABEL else names[number]
    return Table(rows, tuple(names))


def _need(package: str, extra: str, source: str, hint: str = "") -> None:
    if find_spec(package) is None:
        raise DatasetError(
            f"{source}: {hint}this needs the package {package}; install it with: pip install 'scalabl[{extra}]'"
        )
