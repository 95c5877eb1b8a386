"""One look for all figures: readable in print, without colour, and on any machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl

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
