"""Axes that a few far values would stretch: which values belong together, and an axis that is broken between them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from figures.style import points

Span = tuple[float, float]
"""Lowest and highest."""
MOST, LITTLE = 0.6, 0.15
"""Values are far that would leave less than MOST of an axis to most others, and lie further from them than LITTLE of
what those take."""
MAIN, SIDE = 0.74, 0.26
"""Heights of the part with most values, and of each other part, in shares of one broken axis."""
_MARGIN = 0.06


def parts(spans: Sequence[Span]) -> tuple[list[Span], int]:
    """Spans that lie together, as at most three parts of an axis from low to high, and which part has most of them.

    One part where nothing is far, or where no part has more than half of the spans.
    """
    clusters: list[list[Span]] = []
    for span in sorted(spans):
        if clusters and span[0] <= max(high for _, high in clusters[-1]):
            clusters[-1].append(span)
        else:
            clusters.append([span])
    while True:  # near clusters join the largest, whose size says what is near
        main = max(range(len(clusters)), key=lambda i: len(clusters[i]))
        near = [
            i
            for i in (main - 1, main + 1)
            if 0 <= i < len(clusters) and _near(_around(clusters[i]), _around(clusters[main]))
        ]
        if not near:
            break
        first = min(near[0], main)
        clusters[first : first + 2] = [clusters[first] + clusters[first + 1]]
    below, above = chain(*clusters[:main]), chain(*clusters[main + 1 :])
    sides = [list(below), clusters[main], list(above)]
    if len(clusters[main]) * 2 <= len(spans):
        sides = [[], list(spans), []]
    shown = [side for side in sides if side]
    return [_around(side) for side in shown], shown.index(sides[1])


def _near(span: Span, main: Span) -> bool:
    """Whether both can be shown on one axis: little lies between, or the main one still takes most of it."""
    size, whole = main[1] - main[0], max(span[1], main[1]) - min(span[0], main[0])
    return max(span[0] - main[1], main[0] - span[1]) <= LITTLE * size or size >= MOST * whole


def _around(spans: Sequence[Span]) -> Span:
    return min(low for low, _ in spans), max(high for _, high in spans)


def limits(span: Span) -> Span:
    """Of an axis that shows a span, with a margin; the same for a span of one value."""
    low, high = span
    margin = _MARGIN * ((high - low) or abs(high) or 1.0)
    return low - margin, high + margin


def axes(figure: Figure, spans: Sequence[Span]) -> list[Axes]:
    """One vertical axis for these spans, from top to bottom: whole, or broken where a few would stretch it.

    All that is drawn goes into every part, whose limits are set here.
    """
    found, main = parts(spans)
    heights = [MAIN if place == main else SIDE for place in range(len(found))]
    made = figure.subplots(len(found), 1, sharex=True, squeeze=False, height_ratios=heights[::-1])[:, 0]
    for axis, span in zip(made, found[::-1], strict=True):
        axis.set_ylim(limits(span))
        axis.margins(y=0)
    mark: dict[str, Any] = {"marker": [(-1, -0.6), (1, 0.6)], "markersize": points(5), "linestyle": "none"}
    mark |= {"color": "black", "markeredgewidth": points(0.7), "clip_on": False}
    for upper, lower in pairwise(made):
        upper.spines.bottom.set_visible(False)
        upper.tick_params(bottom=False, labelbottom=False)
        upper.plot([0], [0], transform=upper.transAxes, **mark)
        lower.plot([0], [1], transform=lower.transAxes, **mark)
    return list(np.asarray(made))
