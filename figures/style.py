"""One look for all figures: readable in print, without colour, and on any machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl

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
GREY = "0.55"
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

_RC: dict[str, Any] = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "hatch.linewidth": 0.6,
    "figure.dpi": 150,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,
    "figure.constrained_layout.use": True,
}


@contextmanager
def style() -> Iterator[None]:
    """Matplotlib's settings within the block."""
    with mpl.rc_context(_RC):
        yield


def caption(figure: Any, text: str) -> None:
    """Writes the caption below the axes: which data, which settings, what differs from the papers."""
    figure.supxlabel(text, fontsize=7, x=0.01, ha="left", wrap=True)


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
            "markersize": 4.5,
            "markerfacecolor": "white" if self.hollow else self.colour,
            "markeredgecolor": self.colour,
        }


def looks_of(results: Mapping[str, Any], names: Sequence[str], file: str) -> dict[str, Look]:
    """The looks of these methods.

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
        return {name: Look(record.of(record.Look, found[name])) for name in names}
    except ValueError as error:
        raise ValueError(f"{file}, looks: {error}") from None
