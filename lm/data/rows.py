"""Rows of a set: read from the hub or from local files, written whole, and their values checked."""

from __future__ import annotations

import difflib
import math
import re
import reprlib
import tempfile
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]

from lm.base import progress
from lm.base.files import json_line, write_jsonl
from lm.data.formats import BATCH as BATCH
from lm.data.formats import NUMBERS, READ, files_in, read_file
from lm.data.formats import Row as Row
from theory.records import replacing

PIECE = 8192
"""Rows that are held at most, of what is written as Parquet."""
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
"""Files that are written."""
HUB_DATASET = r"([\w-][\w.-]*/[\w.-]+)(?:/([\w.-]+))?(?:@([\w./-]+))?"
"""owner/name/folder@revision."""

# ---------------------------------------------------------------- reading rows


def read_rows(path: str, subset: str | None = None) -> Iterator[tuple[str, Row]]:
    """(where it stands, row) of a local file, a folder of files, or a hub dataset (all its splits).

    A hub dataset is owner/name, or owner/name/folder for one folder of it; either with @revision after it.

    Raises FileNotFoundError for a local path that is not there, ValueError for a malformed line, an unknown file type,
    a hub dataset that cannot be loaded, or where there is no row.
    """
    row = None
    for row in progress.bar(f"reading {path}", _read(path, subset)):
        yield row
    if row is None:
        needed = "; one JSON object a line is needed"
        if path.removesuffix(".gz").endswith((".csv", ".tsv")):
            needed = "; a line with the columns' names is needed, and one a row"
        raise ValueError(f"{path} holds no rows{'' if path.endswith('.parquet') else needed}")


def _read(path: str, subset: str | None) -> Iterator[tuple[str, Row]]:
    local = Path(path)
    try:
        there = local.exists()
    except OSError as error:
        raise ValueError(f"data path {shown(path)} cannot be looked up ({error.strerror})") from None
    if there:
        if subset is not None:
            raise ValueError(f"--subset {subset!r} goes with a hub name, but {path} is local; name the folder itself")
        yield from _read_local(local)
    elif (hub := re.fullmatch(HUB_DATASET, path)) and not path.endswith(READ):
        import datasets  # for a hub's set alone: who reads a run's samples waits for no torch

        try:
            loaded = datasets.load_dataset(hub[1], data_dir=subset or hub[2], revision=hub[3])
        except Exception as error:
            copy = f"; the hub's own copy of it may do: {path}@refs/convert/parquet" if "scripts" in str(error) else ""
            raise ValueError(
                f"data path {path!r} is neither a local file or folder nor a hub dataset that can be loaded "
                f"({type(error).__name__}: {error}){copy}"
            ) from None
        for split, rows in loaded.items():
            for number, row in enumerate(rows):
                yield f"{path}/{split}, row {number}", row
    else:
        raise FileNotFoundError(
            f"data path {shown(path)}: there is no such file or folder, and it is no hub name (owner/name)"
        )


def _read_local(path: Path) -> Iterator[tuple[str, Row]]:
    if not path.is_dir():
        yield from read_file(path)
        return
    files = files_in(path)
    if not files:
        hint = "; a dataset that was saved to disk is read after .to_parquet" if any(path.rglob("*.arrow")) else ""
        raise ValueError(f"{path} holds no {', '.join(READ)} file{hint}")
    for file in files:
        yield from read_file(file)


class Tally(Counter[str]):
    """Rows counted by a reason, and where the first of each stand."""

    FIRST: ClassVar[int] = 3

    def __init__(self, *counts: Any) -> None:
        super().__init__(*counts)
        self.first: dict[str, list[str]] = {}
        """Reason -> where its first rows stand, at most FIRST."""

    def add(self, reason: str, where: str) -> None:
        """One row."""
        self[reason] += 1
        if len(places := self.first.setdefault(reason, [])) < self.FIRST:
            places.append(where)

    def take(self, other: Tally) -> None:
        """Rows that another has counted as well."""
        self.update(other)
        for reason, where in other.first.items():
            self.first[reason] = [*self.first.get(reason, []), *where][: self.FIRST]


def places(first: Sequence[str], count: int) -> str:
    """Where rows stand, in words: "pairs.jsonl, line 3, line 9, ..."; a file that several are in is named once."""
    said: list[str] = []
    before = None
    for where in first:
        file, _, place = where.rpartition(", ")
        said.append(where if file != before else place)
        before = file
    return ", ".join([*said, *(["..."] if count > len(first) else [])])


def left_out(counts: Mapping[str, int], first: Mapping[str, Sequence[str]]) -> list[str]:
    """Lines for each reason: how many rows, why, and where the first of them stand."""
    lines = []
    for reason, count in counts.items():
        lines.append(f"left out: {count:,} rows, {reason}")
        if reason in first:
            lines.append(f"  first: {places(first[reason], count)}")
    return lines


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Writes a .jsonl, .jsonl.gz or .parquet file, whole or not at all, as the rows come. No more than PIECE rows are
    held; Parquet's stand beside the file, by pieces, until it is known what its columns are.

    Parquet has the columns of all rows, null where a row has none. Raises ValueError, with the row and the column, for
    what the type of file has not, or not in one column.
    """
    check_suffix(path)
    if path.suffix != ".parquet":
        write_jsonl(path, rows)
        return
    with replacing(path) as temporary, tempfile.TemporaryDirectory(dir=temporary.parent) as folder:
        pieces: list[tuple[int, Path]] = []
        left, first = iter(rows), 1
        while piece := list(islice(left, PIECE)):
            pieces.append((first, Path(folder, f"{len(pieces)}.arrow")))
            with pyarrow.OSFile(str(pieces[-1][1]), "wb") as file:
                table = _table(piece, first, path)
                with pyarrow.ipc.new_file(file, table.schema) as writer:
                    writer.write_table(table)
            first += len(piece)
        _put_together(pieces, path, temporary)


def _put_together(pieces: Sequence[tuple[int, Path]], path: Path, out: Path) -> None:
    """One Parquet file of Arrow files of rows, each with the number of its first row; ValueError where a column has
    another type in a later one."""
    schema = pyarrow.schema([])
    for first, piece in pieces:
        with pyarrow.memory_map(str(piece)) as file:
            table = pyarrow.ipc.open_file(file).read_all()
            for name in table.column_names:
                one = pyarrow.schema([table.schema.field(name)])
                try:
                    schema = pyarrow.unify_schemas([schema, one], promote_options="permissive")
                except pyarrow.ArrowException as error:
                    at, value = next((i, v) for i, v in enumerate(table[name].to_pylist()) if v is not None)
                    raise _of_another_type(path, first + at, name, value, error) from None
    for field in schema:
        _stored(pyarrow.nulls(1, field.type), field.name, path)
    with pyarrow.parquet.ParquetWriter(out, schema) as writer:
        for _, piece in pieces:
            with pyarrow.memory_map(str(piece)) as file:
                table = pyarrow.ipc.open_file(file).read_all()
                writer.write_table(pyarrow.table([_as(table, field) for field in schema], schema=schema))


def _as(table: pyarrow.Table, field: pyarrow.Field) -> pyarrow.ChunkedArray:
    """A column as that of all rows, which may have other fields of objects in it."""
    if field.name not in table.column_names:
        return pyarrow.chunked_array([pyarrow.nulls(len(table), field.type)])
    own = table[field.name]
    try:
        return own.cast(field.type)
    except pyarrow.ArrowException:
        return pyarrow.chunked_array([pyarrow.array(own.to_pylist(), field.type)])


def _of_another_type(path: Path, row: int, name: str, value: Any, error: Exception) -> ValueError:
    return ValueError(
        f"{path}, row {row}, column {name!r}: {shown(value)} cannot be written to Parquet, where a "
        f"column has one type ({str(error).splitlines()[0]}); take a .jsonl file, or leave it out"
    )


class Writable:
    """Whether `write_rows` could write rows that are known before anything is computed: given each in turn and then
    asked to `settle`, it raises as that would. It keeps one value of each type that a column has."""

    def __init__(self, path: Path) -> None:
        check_suffix(path)
        self.path, self.rows = path, 0
        self._kept: dict[str, dict[str, tuple[int, Any]]] = {}

    def check(self, row: Row) -> None:
        """ValueError where this row cannot be written."""
        self.rows += 1
        if self.path.suffix != ".parquet":
            json_line(row, f"{self.path}, row {self.rows}")
            return
        for name, value in row.items():
            kind = str(_column([value], [self.rows], name, self.path).type)
            self._kept.setdefault(name, {}).setdefault(kind, (self.rows, value))

    def settle(self) -> None:
        """ValueError where these rows cannot be written to one file."""
        for name, kept in self._kept.items():
            rows, values = zip(*kept.values(), strict=True)
            _stored(_column(values, rows, name, self.path), name, self.path)


def _table(rows: list[Row], first: int, path: Path) -> pyarrow.Table:
    """Of the columns of these rows, in the order in which they first come."""
    names = dict.fromkeys(name for row in rows for name in row)
    numbers = range(first, first + len(rows))
    columns = {name: _column([row.get(name) for row in rows], numbers, name, path) for name in names}
    return pyarrow.table(columns)


def _column(values: Sequence[Any], rows: Sequence[int], name: str, path: Path) -> pyarrow.Array:
    """ValueError for the first row whose value has another type than those before it, or one that Arrow has not."""

    def fails(count: int) -> bool:
        try:
            pyarrow.array(values[:count])
        except (pyarrow.ArrowException, OverflowError, ValueError, TypeError):
            return True
        return False

    try:
        return pyarrow.array(values)
    except (pyarrow.ArrowException, OverflowError, ValueError, TypeError) as error:
        at = bisect_left(range(1, len(values) + 1), True, key=fails)
        raise _of_another_type(path, rows[at], name, values[at], error) from None


def _stored(column: pyarrow.Array, name: str, path: Path) -> None:
    """ValueError for a type that Arrow has and Parquet has not."""
    try:
        pyarrow.parquet.write_table(pyarrow.table({name: column}), pyarrow.BufferOutputStream())
    except pyarrow.ArrowException as error:
        raise ValueError(
            f"{path}, column {name!r}: values of type {column.type} cannot be written to Parquet ({error}); take a "
            ".jsonl file, or leave it out"
        ) from None


def check_suffix(path: Path) -> None:
    """ValueError where `write_rows` cannot write such a file."""
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path}: a file of type {', '.join(SUFFIXES)} is needed")


def column(row: Mapping[str, Any], name: str, kind: type, where: str) -> Any:
    """A row's value of this type; ValueError, with where it stands, for what else it is, or where there is none."""
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: an object with {name!r} is needed, got {type(row).__name__}: {shown(row)}")
    if name not in row:
        close = like(name, row)
        hint = f"; is {close[0]!r} meant to be it?" if close else ""
        raise ValueError(f"{where}: column {name!r} is missing, there are {shown(sorted(row))}{hint}")
    value = row[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(
            f"{where}: {name!r} must be of type {kind.__name__}, got {type(value).__name__}: {shown(value)}"
        )
    return unicode_text(value, name, where) if isinstance(value, str) else value


SAME = {
    "prompt": (
        "question",
        "instruction",
        "input",
        "query",
        "request",
        "problem",
        "context",
        "conversation",
        "dialogue",
    ),
    "chosen": ("preferred", "accepted", "winner", "positive", "better", "win"),
    "rejected": ("dispreferred", "unpreferred", "loser", "negative", "worse", "lose", "refused"),
    "completion": ("response", "output", "answer", "reply", "summary", "target", "text"),
    "messages": ("conversation", "conversations", "dialogue", "chat"),
}
"""What else sets call the columns that are read."""


def like(name: str, columns: Iterable[str]) -> list[str]:
    """Columns that may be meant to be this one, the likeliest first: another case, a slip, a part of a longer name
    (`response_chosen`), or another word for it."""
    columns = [column for column in columns if not NUMBERS.search(str(column))]
    plain = {column: re.sub(r"(?<=[a-z])(?=[A-Z])|\W+", "_", str(column)).lower().strip("_") for column in columns}
    slips = difflib.get_close_matches(name, plain.values(), n=3, cutoff=0.6)
    words = (name, *SAME.get(name, ()))

    def rank(column: str) -> tuple[int, int] | None:
        text = plain[column]
        parts = [part.removesuffix("s") for part in text.split("_")]
        if text in (name, f"{name}s"):
            return 0, 0
        if name in parts:
            return 1, len(text)
        if text in slips:
            return 2, slips.index(text)
        found = [words.index(word) for word in words if text == word or word in parts]
        return (3, found[0]) if found else None

    ranked = {column: place for column in plain if (place := rank(column)) is not None}
    return sorted(ranked, key=ranked.__getitem__)


def unicode_text(value: str, name: str, where: str) -> str:
    """The text, which can be written; JSON can hold what cannot."""
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{where}: {name!r} is not Unicode text: half of a surrogate pair, {value[error.start]!r}, at "
                f"character {error.start}"
            ) from None
    return value


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother, _SHORT.maxlong = 4, 200, 200, 100
_SHORT.maxdict = _SHORT.maxlist = _SHORT.maxtuple = 30


def shown(value: Any) -> str:
    """A value in a message: its beginning, where it is long or deep."""
    return _SHORT.repr(value)


def number(value: Any, name: str, where: str) -> float:
    """A finite number; ValueError for anything else."""
    try:
        if not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer beyond the largest float
        pass
    raise ValueError(f"{where}: {name!r} must be a finite number, got {shown(value)}")
