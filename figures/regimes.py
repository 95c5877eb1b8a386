"""The regime map: where distillation, pessimism and the ensemble help, do nothing, hurt, or are undecided."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from figures.captions import plain
from figures.studies import EFFECTS, SAYS, Regime, StudyResults, read_study
from figures.style import COLOURS, figure, legend, points

RESULTS = "study.json"
READ = read_study

_LOOKS: dict[str, dict[str, Any]] = {
    "helps": {"color": COLOURS["green"], "marker": "^"},
    "nothing": {"color": "0.45", "marker": "s"},
    "undecided": {"color": "0.45", "marker": "o", "markerfacecolor": "white"},
    "hurts": {"color": COLOURS["red"], "marker": "v"},
}
_WORDS = {"helps": "helps", "nothing": "no effect that matters", "undecided": "undecided", "hurts": "hurts"}


def draw(results: StudyResults) -> Figure:
    """A panel an effect, a row a cell of corner and rho: the estimate in its interval over worlds, and what it says.

    Cells in which an effect was not measured stay empty.
    """
    if not results.regimes:
        raise ValueError("has no regimes: no corner has a method and what it is compared with")
    rows = list(dict.fromkeys((one.corner, one.rho) for one in results.regimes))
    shown = figure(0.155 * len(rows) + 0.9)
    axes = shown.subplots(1, len(EFFECTS), sharey=True, squeeze=False)[0]
    for axis, (effect, (_, _, compares)) in zip(axes, EFFECTS.items(), strict=True):
        axis.axvspan(-results.margin, results.margin, color="0.93", zorder=0)
        axis.axvline(0, color="0.6", linewidth=points(0.8), zorder=0)
        for at, corner in enumerate(rows):
            for one in results.regimes:
                if (one.effect, one.corner, one.rho) == (effect, *corner):
                    _mark(axis, len(rows) - 1 - at, one)
        axis.set_title(compares)
        axis.set_xlabel("difference in advantage")
        axis.margins(y=0.5 / max(len(rows), 1))
    names = [rf"{plain(corner)}, $\rho = {rho:g}$" for corner, rho in rows]
    axes[0].set_yticks(range(len(rows)), names[::-1])
    axes[0].set_ylim(-0.7, len(rows) - 0.3)
    handles = [Line2D([], [], linestyle="none", markersize=points(4), **_LOOKS[says]) for says in SAYS]
    legend(shown, handles, [_WORDS[says] for says in SAYS], columns=4)
    return shown


def _mark(axis: Any, row: int, one: Regime) -> None:
    error = None if one.low is None or one.high is None else [[one.estimate - one.low], [one.high - one.estimate]]
    mark: dict[str, Any] = {"linestyle": "none", "markersize": points(4), "elinewidth": points(0.9), "capsize": 0}
    axis.errorbar([one.estimate], [row], xerr=error, **mark, **_LOOKS[one.says])


def caption(results: StudyResults) -> str:
    """What is shown."""
    counts = sorted({one.worlds for one in results.regimes})
    worlds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return (
        f"Embedded world, scores of {plain(results.judge)}; {worlds} worlds a cell, settings and steps chosen on "
        f"validation. Bars: {results.confidence:.0%} intervals over worlds, not corrected for their number. Grey: "
        f"differences below {results.margin:g}, which do not matter. Helps or hurts: the interval excludes 0 and the "
        "estimate matters; no effect that matters: it lies in the grey; else undecided. A cell without a mark was not "
        "measured."
    )
