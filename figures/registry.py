"""Every module of this package with `draw(results) -> Figure` and `RESULTS = "<file>.json"` is a figure.

Results are the file's JSON values, or what the module's `READ` makes of the file.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import figures
from figures.paths import RESULTS, write_atomically
from figures.style import style


def modules() -> dict[str, ModuleType]:
    """Figure name -> module."""
    found = {}
    for info in pkgutil.iter_modules(figures.__path__):
        if not info.name.startswith("_") and not info.name.endswith("_test"):
            module = importlib.import_module(f"figures.{info.name}")
            if hasattr(module, "draw") and hasattr(module, "RESULTS"):
                found[info.name] = module
    return found


def redraw(name: str, out: Path, results: Any = None) -> list[Path]:
    """Draws one figure as PNG and PDF.

    Args:
        name: of a figure in `modules`.
        out: folder, made where missing.
        results: what its `draw` takes; read from the committed results where not given.

    Raises:
        ValueError: no such figure, and the message lists those there are; or a file of results that is broken.
        FileNotFoundError: its results have not been computed.
    """
    known = modules()
    if name not in known:
        raise ValueError(f"no figure named {name!r}; there are {', '.join(known)}")
    if results is not None:
        return _drawn(known[name], name, out, results)
    path = RESULTS / known[name].RESULTS
    if not path.exists():
        raise FileNotFoundError(f"figure {name} is drawn from {path}, which does not exist: run its experiment first")
    try:
        return _drawn(known[name], name, out, getattr(known[name], "READ", _json)(path))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"figure {name} is drawn from {path}, which is not what its experiment writes "
            f"({type(error).__name__}: {error})"
        ) from error


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _drawn(module: ModuleType, name: str, out: Path, results: Any) -> list[Path]:
    with style():
        figure = module.draw(results)
        # No creation date: the same results give the same file.
        return [
            write_atomically(out / f"{name}.png", figure.savefig),
            write_atomically(out / f"{name}.pdf", partial(figure.savefig, metadata={"CreationDate": None})),
        ]
