"""What the commands share: options, results as JSON with their provenance, and the figure drawn from them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from theory import records, shell


def folder(name: str) -> Path:
    """An option that names a folder, there or not yet."""
    path = Path(name)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{name} is no folder")
    return path


def check_free(out: Path, *names: str, force: bool) -> None:
    """ValueError where one of the files that --out is to get is there: before anything is computed."""
    for name in names:
        shell.check_free("--out", out / name, force=force)


def provenance(config: dict[str, Any], *, seed: int | None) -> dict[str, Any]:
    """Where a result comes from. `seed` is None where nothing is drawn at random."""
    return records.provenance(seed, ("numpy", "scipy"), config=config)


def write_json(path: Path, document: Any) -> Path:
    """Whole or not at all; returns the path."""
    records.write_json(path, document)
    return path


def write_figure(name: str, document: dict[str, Any], out: Path) -> list[Path]:
    """Writes `<name>.json` and the figure drawn from it: all that this package uses `figures` for."""
    from figures.registry import redraw

    return [write_json(out / f"{name}.json", document), *redraw(name, out, document)]
