"""Whether a cell of a grid can be taken at its word: it chose no end of its sweep, and its student had learnt.

docs/study.md says both rules. `around_end` says what a cell tries next that chose one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lm.objectives import METHODS

MARGIN = 0.05
"""The least difference in the judge's reward that matters: a twentieth of an important event named. [set]"""
MOST = 3
"""Values that a cell may add to its sweep. [set]"""


def scale_option(method: str) -> str:
    """What a method's sweep goes over: beta, tau, or DRDO's weight of preferences, whose beta changes nothing else."""
    return "alpha" if method == "drdo" else METHODS[method].scale_option


def at_edge(cell: Mapping[str, Any]) -> bool:
    """Whether the chosen scale is the least or the greatest that was tried. The greatest beta or tau is no edge where
    the method gains less than the margin with it: beyond it lies pi_ref, which gains 0."""
    option = scale_option(cell["method"])
    tried = {one["setting"][option] for one in cell["validation"] if option in one["setting"]}
    if len(tried) < 2:
        return False
    chosen = cell["chosen"]["setting"][option]
    gains = cell["method"] == "drdo" or cell["test"]["advantage"] >= MARGIN
    return bool(chosen == min(tried) or (chosen == max(tried) and gains))


def still_learning(cell: Mapping[str, Any]) -> bool:
    """Whether accuracy on held-out pairs rose by a point or more from the mean of the two probes before to the last."""
    last = [probe["accuracy"] for probe in cell["probe"][-3:]]
    return len(last) == 3 and last[2] - (last[0] + last[1]) / 2 >= 0.01


def around_end(cell: Mapping[str, Any], sweep: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The setting at the end of its sweep that a cell chose, and the one with which it goes on: beyond 0.01, 0.03, 0.1
    comes 0.3, and below them 0.003.

    Args:
        cell: record of a cell that is `at_edge`.
        sweep: its method's settings.
    """
    option = scale_option(cell["method"])
    by_scale = {one[option]: dict(one) for one in sweep if option in one}
    rising = cell["chosen"]["setting"][option] == max(by_scale)
    last, second, *more = sorted(by_scale, reverse=rising)
    ratio = second / more[0] if more else last / second
    return by_scale[last], {**by_scale[last], option: float(f"{last * ratio:.6g}")}
