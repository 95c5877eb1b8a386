"""Whether a cell of a grid can be taken at its word: it chose no end of its sweep, and its student had learnt.

docs/study.md says both rules. `around_end` says what a cell tries next that chose one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from lm.objectives import METHODS

MARGIN = 0.05
"""The least difference in the judge's reward that matters: a twentieth of an important event named. [set]"""
MOST = 3
"""Values that a cell may add to its sweep. [set]"""


def swept_option(method: str) -> str:
    """What a method's sweep goes over: its scale, as beta or tau, or another weight, as DRDO's of preferences."""
    return METHODS[method].swept_option or METHODS[method].scale_option


def at_edge(cell: Mapping[str, Any]) -> bool:
    """Whether what was chosen is the least or the greatest that was tried with its other options. The greatest beta or
    tau is no edge where the method gains less than the margin with it on validation prompts: beyond it lies pi_ref,
    which gains 0. Nor is a 0, below which there is none."""
    method, tried = METHODS[cell["method"]], _tried(cell)
    chosen = cell["chosen"]["setting"].get(swept_option(cell["method"]))
    if len(tried) < 2 or not chosen:
        return False
    gains = method.swept_option is not None or tried[chosen] >= MARGIN
    return bool(chosen == min(tried) or (chosen == max(tried) and gains))


def still_learning(cell: Mapping[str, Any]) -> bool:
    """Whether accuracy on held-out pairs rose by a point or more from the mean of the two probes before to the last."""
    last = [probe["accuracy"] for probe in cell["probe"][-3:]]
    return len(last) == 3 and last[2] - (last[0] + last[1]) / 2 >= 0.01


def around_end(cell: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The setting at the end of its sweep that a cell chose, and the one with which it goes on: beyond 0.01, 0.03, 0.1
    comes 0.3, and below them 0.003.

    Args:
        cell: record of a cell that is `at_edge`.
    """
    option, setting, tried = swept_option(cell["method"]), dict(cell["chosen"]["setting"]), _tried(cell)
    last, second, *more = sorted(tried, reverse=setting[option] == max(tried))
    ratio = second / more[0] if more else last / second
    return setting, {**setting, option: float(f"{last * ratio:.6g}")}


def _tried(cell: Mapping[str, Any]) -> dict[float, float]:
    """Scale above 0 -> best advantage on validation prompts, of the settings that are otherwise the chosen one."""
    option, chosen = swept_option(cell["method"]), cell["chosen"]["setting"]
    best: dict[float, float] = {}
    for one in cell["validation"]:
        setting = one["setting"]
        if setting.get(option) and all(chosen[name] == value for name, value in setting.items() if name != option):
            best[setting[option]] = max(one["advantage"], best.get(setting[option], -math.inf))
    return best
