"""What a command says on stderr while it works: bars with the time left on a terminal, elsewhere a line a minute.

In a notebook the bars are widgets. Nothing of it where the command is told to be quiet, and in Python nothing unless
`be_quiet(False)` asks for it: commands speak, the library does not. Results go to stdout and errors to stderr by other
ways.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

EVERY = 60.0
"""Seconds between the lines that stand for a bar where stderr is no terminal."""
LINE = "{desc}: {n_fmt} of {total_fmt} ({unit}), {elapsed} gone, {remaining} left{postfix}"

_quiet = True


def be_quiet(quiet: bool = True) -> None:
    """Whether bars and information are left out from now on, in this process: at first they are."""
    global _quiet  # noqa: PLW0603
    _quiet = quiet


def is_quiet() -> bool:
    """Whether they are."""
    return _quiet


def say(text: str) -> None:
    """A line of information, above the bars that are there."""
    if _quiet:
        return
    if "tqdm" in sys.modules:
        sys.modules["tqdm"].tqdm.write(text, file=sys.stderr)
    else:
        print(text, file=sys.stderr)
    sys.stderr.flush()


def bar(
    what: str, rows: Iterable[Any] | None = None, *, total: int | None = None, unit: str = "row", initial: int = 0
) -> tqdm[Any]:
    """A tqdm bar: iterate over it, where it has `rows`, or use it as a context and `update` it."""
    from tqdm.auto import tqdm

    options: dict[str, Any] = {"desc": what, "total": total, "unit": unit, "initial": initial, "leave": False}
    if _quiet:
        return tqdm(rows, disable=True, **options)
    if sys.stderr.isatty() or _is_widget(tqdm):
        return tqdm(rows, dynamic_ncols=True, **options)
    return _lines()(rows, bar_format=LINE, mininterval=EVERY, maxinterval=EVERY, delay=EVERY, **options)


def _is_widget(kind: type[tqdm[Any]]) -> bool:
    """Whether a bar is one of a notebook's, where ipywidgets is installed."""
    from tqdm.notebook import tqdm_notebook

    return issubclass(kind, tqdm_notebook)


@functools.cache
def _lines() -> type[tqdm[Any]]:
    """A bar for a file."""
    from tqdm import tqdm

    class Lines(tqdm):  # type: ignore[type-arg]
        """Whole lines, no carriage returns; nothing of what is done before the first is due."""

        def display(self, msg: str | None = None, pos: int | None = None) -> None:
            """Writes one."""
            self.fp.write(f"{self if msg is None else msg}\n")
            self.fp.flush()

        def close(self) -> None:
            """Leaves what was written as it is, where tqdm would clear it."""
            self.delay = float("inf")
            super().close()

    return Lines
