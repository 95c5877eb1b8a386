"""What all packages but `figures` write results with: files whole or absent, provenance, Markdown tables."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

# ---------------------------------------------------------------- files


UMASK = os.umask(0)
"""Which can only be read by setting it."""
os.umask(UMASK)


def check_replaceable(path: Path) -> None:
    """ValueError for what is there and no file, which a file that is written whole would take the place of."""
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "a device or a pipe"
        raise ValueError(f"{path} is {what}; a file is needed")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside the target that takes its place where the block ends well: it is whole or absent. Of a
    link what it names is written; a file that was there keeps its mode. ValueError where the target is no file."""
    path = Path(os.path.realpath(path))
    check_replaceable(path)
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~UMASK
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(mode)  # temporary files are private
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = str(path)  # a write that fails does not say where
        raise


def write_text(path: Path, text: str) -> None:
    """The file is whole or absent."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Indented JSON; NaN and infinity are refused, as JSON has neither."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


# ---------------------------------------------------------------- where a result comes from


def provenance(seed: int | None, packages: Sequence[str], **more: Any) -> dict[str, Any]:
    """Versions, commit, machine, date, seed and command of this process.

    Args:
        seed: None where nothing is drawn at random.
        packages: whose versions count; None stands for that of one that is not installed.
        more: besides.
    """
    return {
        "versions": {"python": platform.python_version(), **{package: _version(package) for package in packages}},
        "commit": _commit(),
        "machine": {"platform": platform.platform(), "processor": _processor(), "cores": os.cpu_count()},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "command": command(),
        **more,
    }


def command() -> list[str]:
    """What this process runs, as it can be given again: python -m and the module's name, or the script, then the
    arguments."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["-m", spec.name.removesuffix(".__main__")] if spec else sys.argv[:1]
    return ["python", *program, *sys.argv[1:]]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """This checkout's commit, marked where files differ from it; None outside a checkout."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


# ---------------------------------------------------------------- Markdown


def table(header: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: bool = True, padded: bool = True) -> str:
    """A Markdown table, of which a cell is text of one line whatever it holds.

    Args:
        header: of each column.
        rows: a cell a column.
        numbers: whether all columns but the first stand to the right, as numbers do.
        padded: whether cells are as wide as their column, to be read as text too.
    """
    lines = [[_cell(cell) for cell in line] for line in (header, *rows)]
    right = [numbers and i > 0 for i in range(len(header))]
    widths = [max(len(line[i]) for line in lines) if padded else 0 for i in range(len(header))]

    def text(line: list[str]) -> str:
        cells = zip(line, widths, right, strict=True)
        return f"| {' | '.join(cell.rjust(width) if to else cell.ljust(width) for cell, width, to in cells)} |"

    if padded:
        rule = "|".join("-" * (width + 1) + (":" if to else "-") for width, to in zip(widths, right, strict=True))
    else:
        rule = "|".join(" --: " if to else " --- " for to in right)
    return "\n".join([text(lines[0]), f"|{rule}|", *map(text, lines[1:])])


def estimate(value: float, ends: Sequence[float] | None, form: str = "+.2f") -> str:
    """A number and, where it has one, its interval, as they stand in a table."""
    return format(value, form) + ("" if ends is None else f" [{', '.join(format(end, form) for end in ends)}]")


def _cell(value: object) -> str:
    return str(value).replace("|", r"\|").replace("\n", r"\n")
