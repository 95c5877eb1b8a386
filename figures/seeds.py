"""Means over seeds and their intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import stats

Floats = npt.NDArray[np.float64]


def interval(values: npt.ArrayLike, confidence: float) -> tuple[Floats, Floats] | None:
    """Student's interval of the mean over seeds: [S, ...] -> lower and upper ends, [...]; None of one seed."""
    array = np.asarray(values, dtype=np.float64)
    count = len(array)
    if count < 2:
        return None
    half = stats.t.ppf((1 + confidence) / 2, count - 1) * array.std(0, ddof=1) / np.sqrt(count)
    return array.mean(0) - half, array.mean(0) + half


def together(paths: Sequence[Mapping[int, float]]) -> tuple[list[int], Floats]:
    """Steps that all seeds have, [T], and values there, [S, T]; nothing is filled in where one has none."""
    steps = sorted(set.intersection(*(set(path) for path in paths)))
    return steps, np.array([[path[step] for step in steps] for path in paths], dtype=np.float64)


def curve(axis: Any, x: Sequence[float] | Floats, values: Floats, look: Mapping[str, Any], confidence: float) -> None:
    """The mean over seeds, [S, T], as a line, and its interval as a band where there are two or more."""
    axis.plot(x, values.mean(0), **look)
    ends = interval(values, confidence)
    if ends is not None:
        axis.fill_between(x, *ends, color=look["color"], alpha=0.15, linewidth=0, step=_steps(look))


def _steps(look: Mapping[str, Any]) -> Any:
    drawn = look.get("drawstyle", "default")
    return drawn.removeprefix("steps-") if drawn != "default" else None
