"""Every module of this package with `draw(results) -> Figure` and `RESULTS = "<file>.json"` is a figure.

Results are the file's JSON values, or what the module's `READ` makes of the file. `caption(results)` says what is
shown; `texts(results)`, where a module has it, gives further files by their suffix, such as a table's LaTeX.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import figures
from figures.captions import DEFAULT as MARKDOWN
from figures.captions import file_of, write_inside, written
from figures.paths import RESULTS, write_atomically
from figures.style import DEFAULT as PAPER
from figures.style import style as styled

PICTURES: dict[str, dict[str, Any]] = {
    "png": {},
    "pdf": {"metadata": {"CreationDate": None}},
    "svg": {"metadata": {"Date": None}},
}
"""Formats, and what is said in them: no date, so that the same results give the same file."""


def modules() -> dict[str, ModuleType]:
    """Figure name -> module."""
    found = {}
    for info in pkgutil.iter_modules(figures.__path__):
        if not info.name.startswith("_") and not info.name.endswith("_test"):
            module = importlib.import_module(f"figures.{info.name}")
            if hasattr(module, "draw") and hasattr(module, "RESULTS"):
                found[info.name] = module
    return found


def results_of(name: str) -> Path:
    """The file that a figure is drawn from; it may not be there yet. ValueError where there is no such figure."""
    known = modules()
    if name not in known:
        raise ValueError(f"no figure named {name!r}; there are {', '.join(known)}")
    return RESULTS / str(known[name].RESULTS)


def redraw(name: str, out: Path, results: Any = None, *, style: str = PAPER, captions: str = MARKDOWN) -> list[Path]:
    """Draws one figure as PNG, PDF and SVG, with its caption beside it.

    Args:
        name: of a figure in `modules`.
        out: folder, made where missing.
        results: what its `draw` takes; read from the committed results where not given.
        style: of `figures.style.STYLES`.
        captions: where they go, of `figures.captions.WHERE`.

    Raises:
        ValueError: no such figure, style or place of captions, and the message lists those there are; or a file of
            results that is broken.
        FileNotFoundError: its results have not been computed.
    """
    path = results_of(name)
    draw = partial(_drawn, name, out, which=style, where=captions)
    if results is not None:
        return draw(results)
    check(style, captions)
    if not path.exists():
        raise FileNotFoundError(f"figure {name} is drawn from {path}, which does not exist: run its experiment first")
    try:
        return draw(getattr(modules()[name], "READ", _json)(path))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"figure {name} is drawn from {path}, which is not what its experiment writes "
            f"({type(error).__name__}: {error})"
        ) from error


def check(which: str, where: str) -> None:
    """ValueError for a style or a place of captions that there is not."""
    with styled(which):
        file_of("", Path(), where)


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _drawn(name: str, out: Path, results: Any, *, which: str, where: str) -> list[Path]:
    module = modules()[name]
    with styled(which):
        beside, text = file_of(name, out, where), module.caption(results)
        files: dict[Path, str] = {} if beside is None else {beside: written(text, where)}
        texts: Callable[[Any], dict[str, str]] = getattr(module, "texts", lambda _: {})
        files |= {out / f"{name}.{suffix}": content for suffix, content in texts(results).items()}
        figure = module.draw(results)
        if where == "inside":
            write_inside(figure, text)
        pictures = [
            write_atomically(out / f"{name}.{suffix}", partial(figure.savefig, **how))
            for suffix, how in PICTURES.items()
        ]
    return pictures + [write_atomically(path, partial(_write, content)) for path, content in files.items()]


def _write(content: str, path: Path) -> None:
    path.write_text(content, encoding="utf-8", newline="\n")
