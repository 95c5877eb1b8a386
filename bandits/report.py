"""What the commands share: options, results as JSON with their provenance, and the figure drawn from them."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

_REPOSITORY = Path(__file__).parent.parent


def folder(name: str) -> Path:
    """An option that names a folder, there or not yet."""
    path = Path(name)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{name} is no folder")
    return path


def provenance(config: dict[str, Any], *, seed: int | None) -> dict[str, Any]:
    """Where a result comes from. `seed` is None where nothing is drawn at random."""
    return {
        "config": config,
        "seed": seed,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("numpy", "scipy")}},
        "commit": _commit(),
        "machine": f"{platform.system()} {platform.machine()}",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def _commit() -> str | None:
    """The checked-out commit, marked where the code differs from it; None outside a git checkout."""
    try:
        command = ["git", "-C", str(_REPOSITORY)]
        commit = subprocess.run([*command, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
        code = [*command, "status", "--porcelain", "--untracked-files=no", "--", "bandits", "theory"]
        changed = subprocess.run(code, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.strip() + ("-modified" if changed else "")


def write_json(path: Path, document: Any) -> Path:
    """Writes it under a temporary name first, then renames."""
    from figures.paths import write_atomically

    text = json.dumps(document, indent=1, allow_nan=False)
    return write_atomically(path, lambda temporary: temporary.write_text(text + "\n", encoding="utf-8"))


def write_figure(name: str, document: dict[str, Any], out: Path) -> list[Path]:
    """Writes `<name>.json` and the figure drawn from it: all that this package uses `figures` for."""
    from figures.registry import redraw

    return [write_json(out / f"{name}.json", document), *redraw(name, out, document)]
