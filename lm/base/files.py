"""Files: JSON lines with errors that name the line, checksums, links; `theory.records` writes them whole."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import math
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from theory.records import replacing


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """One JSON value a line, as they come; compressed for .gz, and then without a time stamp.

    Raises ValueError, with the row and the column, for what JSON has not (see `json_line`).
    """
    with contextlib.ExitStack() as stack:
        file: Any = stack.enter_context(stack.enter_context(replacing(path)).open("wb"))
        if path.suffix == ".gz":
            file = stack.enter_context(gzip.GzipFile("", "wb", fileobj=file, mtime=0))
        for number, row in enumerate(rows, 1):
            file.write(json_line(row, f"{path}, row {number}"))


def json_line(row: Any, where: str) -> bytes:
    """A value as a line of JSON. ValueError, with `where` and the column, for what JSON has not: numbers that are not
    finite, dates and times, bytes, halves of surrogate pairs and the like. None of these becomes something else."""
    try:
        return (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError):
        column, value = next(_not_json(row, ""), ("", row))
        named = f", column {column!r}" if column else ""
        raise ValueError(
            f"{where}{named}: {repr(value)[:100]} ({type(value).__name__}) cannot be written as JSON; leave it out, "
            "turn it into text, or take a .parquet file, which has numbers that are not finite, dates and bytes"
        ) from None


def _not_json(value: Any, column: str) -> Iterator[tuple[str, Any]]:
    """What JSON has not in a value, and where it is in it."""
    if isinstance(value, dict):
        for name, item in value.items():
            if isinstance(name, str):
                yield from _not_json(item, f"{column}.{name}" if column else name)
            else:
                yield column, name
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _not_json(item, f"{column}[{i}]")
    elif isinstance(value, str):
        if any("\ud800" <= character <= "\udfff" for character in value):
            yield column, value
    elif not (value is None or isinstance(value, bool | int) or (isinstance(value, float) and math.isfinite(value))):
        yield column, value


def parse_json(text: str) -> Any:
    """A JSON value. ValueError where it is none, and for an object that has a name twice: one of the two would be
    lost."""
    return json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"an object has {next(name for name in names if names.count(name) > 1)!r} twice")
    return made


def read_jsonl(path: Path, kinds: Iterable[str] = (".jsonl", ".jsonl.gz")) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, object) of a .jsonl(.gz) file; ValueError names the file and line of a malformed one.

    Args:
        path: the file.
        kinds: of file that whoever asks reads, for messages.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8-sig") as file:
        number = 0
        try:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    row = parse_json(line)
                except json.JSONDecodeError as error:
                    array = "; rows in a list are read from a .json file" * (number == 1 and line.lstrip()[0] == "[")
                    whole = "; an object over several lines is not read" * (number == 1 and line.strip() == "{")
                    raise ValueError(
                        f"{path}, line {number}: not JSON ({error.msg} at column {error.colno}){array}{whole}"
                    ) from None
                except (ValueError, RecursionError) as error:  # a number of thousands of digits, or lists that deep
                    raise ValueError(f"{path}, line {number}: not JSON that can be read ({error})") from None
                if not isinstance(row, dict):
                    raise ValueError(f"{path}, line {number}: a JSON object is needed, got {type(row).__name__}")
                yield number, row
        except (UnicodeDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"{path}, after line {number}: cannot be read ({error}); what is read is {', '.join(kinds)}, "
                "JSON lines as text in UTF-8"
            ) from None


def expanded(path: str) -> str:
    """A path or name with its `~` and `$VARIABLES` filled in, unless it is there as it is written.

    Raises ValueError for a variable that is not set, and for a user without a home.
    """
    if ("~" not in path and "$" not in path) or os.path.lexists(path):
        return path
    filled = os.path.expanduser(os.path.expandvars(path))
    if left := re.search(r"\$(\w+|\{[^}]*\})", filled):
        raise ValueError(f"path {path!r}: the environment has no variable {left[1].strip('{}')}")
    if filled.startswith("~"):
        raise ValueError(f"path {path!r}: there is no home {filled.split('/')[0]}")
    return filled


def inside(folder: Path, name: str) -> Path:
    """The path that a file of a folder names in it. ValueError where it leads out: the folder may come from others."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{name!r} leads out of {folder}, which may name files of its own only")
    return path


def link_or_copy(source: str, target: str) -> None:
    """The same file under another name, a copy where the file system has no hard links. For files that stay as they
    are."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes, or of all files below a folder with their relative names."""
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        if file != path:
            digest.update(str(file.relative_to(path)).encode() + b"\0")
        with file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: digest)
    return digest.hexdigest()
