"""Files of rows, one reader a type: JSON lines, a JSON array, comma- and tab-separated values, Parquet; all but the
last also packed by gzip. A malformed row is a ValueError that says where it stands."""

from __future__ import annotations

import csv
import gzip
import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]

from lm.base.files import parse_json, read_jsonl

Row = dict[str, Any]
TEXTS = (".jsonl", ".json", ".csv", ".tsv")
READ = (*(f"{suffix}{packed}" for suffix in TEXTS for packed in ("", ".gz")), ".parquet")
"""Files that are read, by the ends of their names."""
NOT_ROWS = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"})
"""What libraries leave in a folder beside the rows."""
BATCH = 1000
"""Rows at a time, of what is tokenised or read from Parquet."""

TABLES = ("data", "rows", "train", "test", "validation", "examples", "instances", "items", "pairs", "preferences")
ROW = frozenset({"prompt", "chosen", "rejected", "completion", "messages", "conversations", "info", "post", "article"})
"""Of an object that holds all rows, and of a row."""

NUMBERS = re.compile(
    r"(^|_)(rewards?|scores?|margins?|confidence|choice|label|labels|preference|votes?|weights?|rank|rating|logps)(_|$)"
)
"""Columns of a CSV file that hold numbers, or JSON lists of them, where they can; every other one is text."""


def files_in(folder: Path) -> list[Path]:
    """The files of a folder, and of those below it, that hold rows."""
    return sorted(
        file
        for file in folder.rglob("*")
        if file.name.endswith(READ)
        and file.name not in NOT_ROWS
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )


def read_file(path: Path) -> Iterator[tuple[str, Row]]:
    """(where it stands, row) of a file of one of the types that are READ; ValueError for another one."""
    name = path.name.removesuffix(".gz")
    if path.suffix == ".parquet":
        yield from _parquet(path)
    elif not path.name.endswith(READ):
        raise ValueError(f"{path}: a file of type {', '.join(READ)} is needed")
    elif name.endswith((".csv", ".tsv")):
        yield from _separated(path, "," if name.endswith(".csv") else "\t")
    elif name.endswith(".json") and _first_character(path) == "[":
        yield from _array(path)
    else:
        yield from _lines(path)


def _lines(path: Path) -> Iterator[tuple[str, Row]]:
    for number, row in read_jsonl(path, READ):
        where = f"{path}, line {number}"
        if tables := [name for name in TABLES if isinstance(row.get(name), list | dict) and not ROW & row.keys()]:
            raise ValueError(
                f"{where}: an object whose {tables[0]!r} holds the rows; give them alone, as a list in a .json file or "
                "one a line"
            )
        yield where, row


def _opened(path: Path) -> TextIO:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    file: TextIO = opener(path, "rt", encoding="utf-8-sig", newline="")
    return file


def _first_character(path: Path) -> str:
    try:
        with _opened(path) as file:
            for line in file:
                if line.strip():
                    return line.strip()[0]
    except _UNREADABLE:
        pass  # whoever reads it says so, with the line
    return ""


_UNREADABLE = (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error)


def _array(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        with _opened(path) as file:
            rows = parse_json(file.read())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg} at column {error.colno})") from None
    except _UNREADABLE as error:
        raise ValueError(f"{path}: cannot be read ({error}); JSON is text in UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON that can be read ({error})") from None
    for number, row in enumerate(rows):
        where = f"{path}, row {number}"
        if not isinstance(row, dict):
            raise ValueError(f"{where}: a JSON object is needed, got {type(row).__name__}")
        yield where, row


# ---------------------------------------------------------------- separated values


def _separated(path: Path, separator: str) -> Iterator[tuple[str, Row]]:
    before = csv.field_size_limit()
    start = 0
    try:
        with _opened(path) as file:
            reader = csv.reader(file, delimiter=separator, strict=True)
            names: list[str] = []
            while True:
                start = reader.line_num + 1
                csv.field_size_limit(2**31 - 1)  # the limit is the process's: set for each row, and put back
                try:
                    fields = next(reader, None)
                finally:
                    csv.field_size_limit(before)
                if fields is None:
                    return
                if not fields or fields == [""]:
                    continue
                where = f"{path}, line {start}"
                if not names:
                    names = _header(fields, where, separator)
                elif len(fields) != len(names):
                    raise ValueError(
                        f"{where}: {len(fields)} fields, the first line names {len(names)} columns; a field with "
                        f'{"commas" if separator == "," else "tabs"}, quotes or lines stands in "..."'
                    )
                else:
                    yield where, {name: _value(name, text, where) for name, text in zip(names, fields, strict=True)}
    except csv.Error as error:
        raise ValueError(f"{path}, line {start}: not separated values that can be read ({error})") from None
    except _UNREADABLE as error:
        raise ValueError(f"{path}, line {start} or later: cannot be read ({error}); text in UTF-8 is read") from None


def _header(names: list[str], where: str, separator: str) -> list[str]:
    names = [name.strip() for name in names]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{where}: column {twice[0]!r} is named twice")
    other = next((mark for mark in ",;\t|" if mark != separator and mark in names[0]), None)
    if len(names) == 1 and other is not None:
        raise ValueError(
            f"{where}: one column, {names[0]!r}: it seems to be separated by {other!r}; .csv is by commas, .tsv by tabs"
        )
    return names


def _value(name: str, text: str, where: str) -> Any:
    """A field: text, but a number or a list of them in a column that is for these, and there None where it is empty."""
    if not NUMBERS.search(name):
        return text
    if not text.strip():
        return None
    if text.strip().startswith("["):
        try:
            return parse_json(text)
        except (ValueError, RecursionError):
            raise ValueError(f"{where}: {name!r} is no JSON list, got {text[:200]!r}") from None
    try:
        value = float(text)
    except ValueError:
        return text
    if not math.isfinite(value):
        raise ValueError(f"{where}: {name!r} must be a finite number, or empty where there is none, got {text!r}")
    return int(value) if re.fullmatch(r"\s*[+-]?\d{1,15}\s*", text) else value


# ---------------------------------------------------------------- Parquet


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(BATCH):
                for row in batch.to_pylist():
                    yield f"{path}, row {number}", row
                    number += 1
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read as parquet ({error})") from None
