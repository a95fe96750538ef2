"""Rows as people have them, through `train`, `evaluate` and `calibrate`: labels, columns, and warnings with counts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scalabl_server.cli.main import app
from typer.testing import CliRunner, Result

from scalabl.files.adapter_directory import read_config
from tests import tiny

COLOURS = list(tiny.CLASSIFICATION.choices)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with an adapter, and rows as CSV with a byte order mark and CRLF."""
    folder = tmp_path_factory.mktemp("rows")
    tiny.write_base(folder / "base")
    tiny.write_adapter(folder / "adapter")
    table(folder / "train.csv", 30)
    table(folder / "test.csv", 6, first=100)
    return folder


def table(path: Path, count: int, first: int = 0, labels: list[str] = COLOURS) -> Path:
    lines = ["sentence,gold", *(f"text {first + n},{labels[n % len(labels)]}" for n in range(count))]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    return path


COLUMNS = ("--text-column", "sentence", "--label-column", "gold")


def train(work: Path, output: Path, *arguments: object, data: Path | None = None) -> Result:
    rows = ("--train", data or work / "train.csv", "--validation", work / "test.csv", *COLUMNS)
    return run("train", "--model", work / "base", *rows, "--output", output, "--max-steps", 1, "--eval-steps", 1, *arguments)


def test_an_adapter_is_trained_on_a_table_and_its_choices_are_the_sorted_labels(work: Path, tmp_path: Path) -> None:
    result = train(work, tmp_path / "new")
    assert result.exit_code == 0, result.output
    assert read_config(tmp_path / "new").task.choices == tuple(sorted(COLOURS))
    assert "warning" not in result.stderr
    scored = run("evaluate", "--adapter", tmp_path / "new", "--model", work / "base", "--data", work / "test.csv", *COLUMNS,
                 "--num-samples", 2, "--bootstrap", 0)  # fmt: skip
    assert scored.exit_code == 0, scored.output
    assert json.loads(scored.stdout)["data"]["inputs"] == 6


def test_labels_are_given_in_order_by_a_file_or_one_by_one(work: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("\n".join([*COLOURS, "x, y"]))
    result = train(work, tmp_path / "file", "--labels", tmp_path / "labels.txt")
    assert result.exit_code == 0, result.output
    assert read_config(tmp_path / "file").task.choices == (*COLOURS, "x, y")
    for name in ("train", "test"):
        assert f"warning: 1 of 4 choices has no row in {work.name}/{name}.csv: 'x, y'\n" in result.stderr
    named = train(work, tmp_path / "named", *(part for name in [*COLOURS, "x, y"] for part in ("--label", name)))
    assert named.exit_code == 0, named.output
    assert read_config(tmp_path / "named").task.choices == (*COLOURS, "x, y")
    both = train(work, tmp_path / "both", "--labels", tmp_path / "labels.txt", "--label", "a")
    assert (both.exit_code, "--labels" in both.stderr) == (2, True)


def test_a_label_of_the_training_rows_that_is_not_given_is_refused_with_its_line(work: Path, tmp_path: Path) -> None:
    result = train(work, tmp_path / "new", "--label", COLOURS[0], "--label", COLOURS[1])
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: {work / 'train.csv'}:4: {COLOURS[2]!r} is not one of the 2 labels; correct it, or add it to them\n"
    )
    assert not (tmp_path / "new").exists()


def test_training_warns_once_each_of_uneven_classes_and_of_texts_in_both_sets(work: Path, tmp_path: Path) -> None:
    labels = [COLOURS[0]] * 101 + [COLOURS[1]]
    result = train(work, tmp_path / "new", data=table(tmp_path / "train.csv", 103, labels=labels))
    assert result.exit_code == 0, result.output
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
    assert [line.split(" of ")[0].removeprefix("warning: ") for line in warnings] == [
        "2 rows",  # of the validation rows, with the label that training has not
        "the classes",
        "2 rows",  # of the validation rows, with texts of training rows
    ]
    assert f"{COLOURS[2]!r}: 2" in warnings[0]


def test_labels_that_the_adapter_does_not_know_are_left_out_of_the_scores_and_said(work: Path, tmp_path: Path) -> None:
    data = table(tmp_path / "test.csv", 8, labels=[*COLOURS, "mauve"])
    result = run("evaluate", "--adapter", work / "adapter", "--model", work / "base", "--data", data, *COLUMNS,
                 "--ood", data, "--num-samples", 2, "--bootstrap", 0)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["data"]["inputs"] == 6
    name = f"{tmp_path.name}/test.csv"
    assert (
        f"warning: 2 rows of {name} left out: 1 label is not among the choices of the adapter ('mauve': 2)" in result.stderr
    )
    assert f"warning: 6 rows of the 8 of {name} have a text that is also in {name}" in result.stderr


def test_calibration_says_which_rows_are_repeated(work: Path, tmp_path: Path) -> None:
    data = tmp_path / "held-out.csv"
    data.write_text("sentence,gold\n" + "".join(f"text {n % 20},{COLOURS[n % 2]}\n" for n in range(40)))
    result = run("calibrate", "--adapter", work / "adapter", "--model", work / "base", "--data", data, *COLUMNS,
                 "--num-samples", 2, "--no-abstain", "--levels", "0.8")  # fmt: skip
    assert result.exit_code == 0, result.output
    name = f"{tmp_path.name}/held-out.csv"
    assert (
        f"warning: 20 rows of the 40 of {name} repeat the text of an earlier row; each text must be there once\n"
        in result.stderr
    )
    assert f"warning: 1 of 3 choices has no row in {name}: {COLOURS[2]!r}\n" in result.stderr
    assert read_config(work / "adapter").calibration is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--text-column", "none"), "train.csv:2: the row has no column 'none'; its columns are sentence, gold"),
        (("--kind", "multiple_choice"), "train.csv:2: the row has a label, and multiple choice needs 'choices'"),
        (("--train", "none.csv"), "none.csv cannot be read: No such file or folder"),
        (("--train", "org/none:train"), "org/none:train: no file has that name, so it was read as a hub id; this needs"),
    ],
)
def test_what_is_wrong_with_the_rows_is_one_line(
    arguments: tuple[str, ...], message: str, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scalabl.evaluation.dataset.arrow.find_spec", lambda name: None)
    result = train(work, tmp_path / "new", *arguments)
    assert (result.exit_code, isinstance(result.exception, SystemExit)) == (1, True)
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
