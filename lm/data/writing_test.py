"""What is written: valid files with every column, or none and the row and column that stand in the way."""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet  # type: ignore[import-untyped]
import pytest

from lm.base.files import write_jsonl
from lm.data.rows import SUFFIXES, Row, Writable, read_rows, write_rows

NOON = datetime.datetime(2026, 11, 29, 12)


def lines(path: Path) -> list[Any]:
    """As a strict reader of JSON has them."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    content = path.read_bytes()
    text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def by_check(path: Path, rows: list[Row]) -> None:
    """Told before anything is written."""
    writable = Writable(path)
    for row in rows:
        writable.check(row)
    writable.settle()


WRITERS = pytest.mark.parametrize("write", [write_rows, by_check])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_column_may_come_late(suffix: str, tmp_path: Path) -> None:
    rows: list[Row] = [
        {"prompt": "a", "count": 3},
        {"prompt": "b", "count": None, "late": "x", "nested": {"a": 1}},
        {"prompt": "c", "tags": ["x"], "count": 2**60},
    ]
    path = tmp_path / f"rows{suffix}"
    by_check(path, rows)
    write_rows(path, rows)
    read = [row for _, row in read_rows(str(path))]
    if suffix == ".parquet":
        assert list(read[0]) == ["prompt", "count", "late", "nested", "tags"]
        read = [
            {name: value for name, value in row.items() if value is not None or name in made}
            for row, made in zip(read, rows, strict=True)
        ]
    else:
        assert lines(path) == rows
    assert read == rows
    assert type(read[0]["count"]) is int


@pytest.mark.parametrize(
    ("value", "column", "shown"),
    [
        (float("nan"), "x", r"nan \(float\)"),
        ([1.0, float("-inf")], r"x\[1\]", r"-inf \(float\)"),
        ({"a": [{"b": NOON}]}, r"x\.a\[0\]\.b", r"datetime.*\(datetime\)"),
        (NOON.date(), "x", r"datetime.date.*\(date\)"),
        (NOON.time(), "x", r"datetime.time.*\(time\)"),
        (b"abc", "x", r"b'abc' \(bytes\)"),
        (decimal.Decimal("1.50"), "x", r"Decimal\('1.50'\) \(Decimal\)"),
        ({("a",): 1}, "x", r"\('a',\) \(tuple\)"),
        ("half \ud800", "x", r"'half .ud800' \(str\)"),
        ({"a"}, "x", r"\{'a'\} \(set\)"),
    ],
)
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@WRITERS
def test_what_json_has_not_is_named_and_nothing_is_written(
    write: Callable[..., None], suffix: str, value: Any, column: str, shown: str, tmp_path: Path
) -> None:
    path = tmp_path / f"rows{suffix}"
    with pytest.raises(ValueError, match=rf"rows{suffix}, row 2, column '{column}': {shown} cannot be written as JSON"):
        write(path, [{"x": 1}, {"a": "b", "x": value}])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [float("nan"), NOON, b"abc", decimal.Decimal("1.50"), NOON.date()])
def test_parquet_has_what_json_has_not(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    by_check(path, [{"x": None}, {"x": value}])
    write_rows(path, [{"x": None}, {"x": value}])
    _, (_, row) = read_rows(str(path))
    assert row["x"] == value or value != value
    assert type(row["x"]) is type(value)


@pytest.mark.parametrize(
    ("values", "row"),
    [
        ([1, 2, "three"], 3),
        (["a", {"b": 1}], 2),
        ([[1], [2], 3], 3),
        ([True, 1], 2),
        ([{"a": 1}, {"a": 2}, {"a": "x"}, {"a": 3}], 3),
        ([1, 2**70], 2),
        (["a", "half \ud800"], 2),
        ([object()], 1),
    ],
)
@WRITERS
def test_what_one_column_of_parquet_cannot_hold_is_named(
    write: Callable[..., None], values: list[Any], row: int, tmp_path: Path
) -> None:
    path = tmp_path / "rows.parquet"
    with pytest.raises(ValueError, match=rf"rows.parquet, row {row}, column 'x': .* cannot be written to Parquet"):
        write(path, [{"a": 1, "x": value} for value in values])
    assert list(tmp_path.iterdir()) == []


@WRITERS
def test_a_column_of_empty_objects_is_told_of(write: Callable[..., None], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"column 'x': values of type struct<> cannot be written to Parquet"):
        write(tmp_path / "rows.parquet", [{"x": {}}])
    write(tmp_path / "more.parquet", [{"x": {}}, {"x": {"a": 1}}])


def test_pieces_of_a_parquet_file_are_one_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm.data.rows.PIECE", 2)
    rows: list[Row] = [
        {"x": 1, "said": [{"role": "user"}]},
        {"x": None},
        {"x": 2.5, "late": "a", "said": [{"role": "user", "name": "b"}]},
        {"x": 4, "said": []},
        {"said": None},
    ]
    path = tmp_path / "rows.parquet"
    write_rows(path, iter(rows))
    in_pieces = pyarrow.parquet.read_table(path)
    monkeypatch.setattr("lm.data.rows.PIECE", 8)
    write_rows(path, rows)
    assert in_pieces.equals(pyarrow.parquet.read_table(path))
    assert list(tmp_path.iterdir()) == [path], "the pieces are gone"


@pytest.mark.parametrize("last", ["three", {"a": 1}, [1], True])
def test_a_later_piece_of_another_type_is_named(last: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lm.data.rows.PIECE", 2)
    with pytest.raises(ValueError, match=r"rows.parquet, row 4, column 'x': .* a column has one type"):
        write_rows(tmp_path / "rows.parquet", [{"x": 1}, {"x": 2}, {"x": None}, {"x": last}])
    assert list(tmp_path.iterdir()) == []


def test_no_rows_are_a_file_without_columns(tmp_path: Path) -> None:
    write_rows(tmp_path / "none.parquet", [])
    assert pyarrow.parquet.read_table(tmp_path / "none.parquet").num_rows == 0


def test_a_value_that_is_no_row_is_named_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a.jsonl, row 1: nan \(float\) cannot be written as JSON"):
        write_jsonl(tmp_path / "a.jsonl", [float("nan")])
