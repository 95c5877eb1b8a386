"""Where results lie, and writing without leaving anything half-written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
"""The committed results, small JSON documents with their provenance."""


def write_atomically(path: Path, write: Callable[[Path], object]) -> Path:
    """Calls write(temporary path in the same folder), then renames the file to `path`; returns `path`.

    The temporary name keeps the suffix, from which writers such as Matplotlib's tell the format.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
