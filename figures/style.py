"""One look for all figures: colours, lines, and sizes of a paper's columns or of slides; readable without colour."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patheffects import Normal, Stroke

from figures import record

# Okabe and Ito's colours, distinct under every common colour vision; lines differ in dash and bars in hatching as well.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#D55E00",
    "#CC79A7",
    "#56B4E9",
    "#000000",
)
GREY = "0.4"
COLOURS = {
    "black": BLACK,
    "grey": GREY,
    "sky": SKY,
    "blue": BLUE,
    "green": GREEN,
    "red": RED,
    "purple": PURPLE,
    "orange": ORANGE,
}
"""By the names that looks in results have."""
PI_REF = r"$\pi_{\mathrm{ref}}$"

# ---------------------------------------------------------------- sizes


@dataclass(frozen=True, kw_only=True)
class Style:
    """Where a figure is to stand.

    Args:
        single, double: width of one column and of two, inches.
        tallest: a figure's height at most, inches.
        font, small: of titles and axis labels, and of ticks and legends, points.
        line, marker: points.
        dpi: of PNG.
    """

    single: float
    double: float
    tallest: float
    font: float
    small: float
    line: float
    marker: float
    dpi: int


STYLES = {
    "paper": Style(single=3.25, double=6.75, tallest=9.0, font=8, small=7, line=1.2, marker=3.5, dpi=300),
    "slides": Style(single=6.0, double=12.0, tallest=6.6, font=15, small=13, line=2.2, marker=6.5, dpi=150),
}
"""A paper of two columns, and slides of 13.3 by 7.5 inches."""
DEFAULT = "paper"
_current: ContextVar[Style] = ContextVar("style", default=STYLES[DEFAULT])


def _settings(this: Style) -> dict[str, Any]:
    """Matplotlib's."""
    small = dict.fromkeys(
        ("xtick.labelsize", "ytick.labelsize", "legend.fontsize", "legend.title_fontsize"), this.small
    )
    ticks = {f"{axis}tick.{which}.width": this.line / 2 for axis in "xy" for which in ("major", "minor")}
    return {
        **small,
        **ticks,
        "font.size": this.font,
        "axes.titlesize": this.font,
        "axes.labelsize": this.font,
        "axes.linewidth": this.line / 2,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "legend.frameon": False,
        "legend.handlelength": 3.2,
        "lines.linewidth": this.line,
        "lines.markersize": this.marker,
        "errorbar.capsize": this.marker / 3,
        "hatch.linewidth": this.line / 2,
        "figure.dpi": 150,
        "savefig.dpi": this.dpi,
        "pdf.fonttype": 42,  # outlines that editors can edit and publishers accept, not Type 3
        "ps.fonttype": 42,
        "svg.fonttype": "path",
        "svg.hashsalt": "figures",  # ids are the same every time
        "figure.constrained_layout.use": True,
    }


@contextmanager
def style(name: str = DEFAULT) -> Iterator[Style]:
    """Sizes and matplotlib's settings within the block; ValueError for a style that there is not."""
    if name not in STYLES:
        raise ValueError(f"no style named {name}; there are {', '.join(STYLES)}")
    token = _current.set(STYLES[name])
    try:
        with mpl.rc_context(_settings(STYLES[name])):
            yield STYLES[name]
    finally:
        _current.reset(token)


def figure(height: float, *, columns: int = 2, tall: bool = False) -> Figure:
    """An empty one.

    Args:
        height: inches in a paper; slides are larger by as much as they are wider.
        columns: of the page that it takes, 1 or 2.
        tall: it may be taller than its style has them.
    """
    this = _current.get()
    width = this.single if columns == 1 else this.double
    height *= this.double / STYLES["paper"].double
    return Figure(figsize=(width, height if tall else min(height, this.tallest)))


def points(count: float) -> float:
    """Points on paper as points of the style: line widths, markers, distances."""
    return count * _current.get().line / STYLES["paper"].line


def legend(shown: Figure, handles: Sequence[Any], labels: Sequence[str], *, columns: int = 4) -> None:
    """One for all panels, above them."""
    shown.legend(handles, labels, loc="outside upper center", ncols=min(columns, len(labels)), columnspacing=1.5)


def handles_of(axes: Iterable[Any]) -> tuple[list[Any], list[str]]:
    """Of panels that do not all have the same lines: handles and labels for `legend`, each once."""
    found = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    return list(found.values()), list(found)


# ---------------------------------------------------------------- looks


class Look:
    """A method's look, in matplotlib's terms.

    Args:
        look: as results have it.

    Raises:
        ValueError: a colour that there is not.
    """

    def __init__(self, look: record.Look) -> None:
        if look.colour not in COLOURS:
            raise ValueError(f"the colour of {look.title} must be one of {', '.join(COLOURS)}; got {look.colour!r}")
        self.title, self.marker, self.hollow = look.title, look.marker, look.hollow
        self.colour = COLOURS[look.colour]
        self.dashes: Any = (0, tuple(look.dashes)) if look.dashes else "-"

    @property
    def line(self) -> dict[str, Any]:
        """Arguments of `plot` and `errorbar`."""
        return {
            "color": self.colour,
            "linestyle": self.dashes,
            "marker": self.marker,
            "markerfacecolor": "white" if self.hollow else self.colour,
            "markeredgecolor": self.colour,
        }


def looks_of(results: Mapping[str, Any], names: Sequence[str], file: str) -> dict[str, Look]:
    """The looks of these methods, in the order of the results' looks: that of the methods' definition.

    Args:
        results: with `looks`, as `figures.record.Results` has them.
        names: of methods.
        file: what the results are called.

    Raises:
        ValueError: a method has none, or one that cannot be drawn; it names the method.
    """
    found = results.get("looks", {})
    without = [name for name in names if name not in found]
    if without:
        raise ValueError(
            f"{file} has no looks.{without[0]}, by which {without[0]} is drawn; what writes it takes it from the "
            "method, so write it anew"
        )
    try:
        return {name: Look(record.of(record.Look, found[name])) for name in found if name in names}
    except ValueError as error:
        raise ValueError(f"{file}, looks: {error}") from None


_SERIES = tuple(
    {"color": colour, "linestyle": dashes, "marker": marker, "markerfacecolor": "white"}
    for colour, dashes, marker in (
        (BLUE, "-", "o"),
        (ORANGE, (0, (7, 2)), "v"),
        (GREEN, (0, (4, 1.5)), "s"),
        (PURPLE, (0, (5, 1, 1, 1)), "D"),
        (RED, (0, (1, 1)), "^"),
        (BLACK, (0, (2, 2)), "X"),
        (SKY, (0, (3, 1, 1, 1, 1, 1)), "P"),
    )
)


def series(what: str, names: Sequence[Any], file: str) -> list[dict[str, Any]]:
    """Looks of lines that are not methods, one each; ValueError where there are more than can be told apart.

    Args:
        what: the lines are.
        names: of each.
        file: that they are drawn from.
    """
    if len(names) > len(_SERIES):
        raise ValueError(f"a figure can tell {len(_SERIES)} {what} apart, {file} has {len(names)}")
    return list(_SERIES[: len(names)])


def layered(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The looks of lines that may cover each other: each is narrower than those below it, with a white edge, and has
    its markers elsewhere, so that of two in the same place both are seen."""
    count, made = len(lines), []
    for place, line in enumerate(lines):
        width = points(3.0 - 2.0 * place / (count - 1)) if count > 1 else points(1.2)
        edge = [] if place == 0 else [Stroke(linewidth=width + points(1.2), foreground="white"), Normal()]
        order = {"zorder": 2 + place / count, "markevery": (place, count)}
        made.append({**line, "linewidth": width, "path_effects": edge, **order})
    return made
