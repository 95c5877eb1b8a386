"""Figure B.4: advantage on validation prompts by beta (tau for IPO)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from figures import broken
from figures.grid import DATA, cells, methods_of, need, rhos_of, seeds_of
from figures.style import figure, legend, points, series

RESULTS = "grid.json"

_SYMBOLS = {"beta": r"$\beta$", "tau": r"$\tau$", "alpha": r"$\alpha$", "gamma": r"$\gamma$"}
_COLUMNS = 4
_DODGE = 0.13
"""Between the curves at a setting, in shares of the distance to the next."""


def draw(results: dict[str, Any]) -> Figure:
    """A panel a method, a curve a rho: the best step of each setting, averaged over seeds, with its interval over
    prompts; dots: each seed; filled: the best setting.

    Panels have one vertical axis, but those whose values lie far from the others' have their own.
    """
    rhos, methods = rhos_of(results), methods_of(results)
    looks = series("rhos", rhos, RESULTS)
    columns, rows = min(len(methods), _COLUMNS), -(-len(methods) // _COLUMNS)
    shown = figure(1.6 * rows + 0.5)
    axes = shown.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(methods) :]:
        axis.set_visible(False)
    panels = list(zip(axes.flat, methods, strict=False))
    bars: list[broken.Span] = []
    spans: list[broken.Span] = []
    for axis, method in panels:
        name, curves = _curves(results, method, rhos)
        settings = sorted({setting for curve in curves for setting in curve})
        near = min((b / a for a, b in pairwise(settings)), default=10.0)
        for place, (curve, rho, look) in enumerate(zip(curves, rhos, looks, strict=True)):
            aside = near ** (_DODGE * (place - (len(rhos) - 1) / 2) * 2 / max(len(rhos) - 1, 1))
            x, by_seed = np.array(sorted(curve)) * aside, [curve[setting].by_seed for setting in sorted(curve)]
            values, errors = np.mean(by_seed, axis=1), [curve[setting].error for setting in sorted(curve)]
            label = rf"$\rho = {rho:g}$"
            axis.errorbar(x, values, yerr=np.array(errors).T, elinewidth=points(0.8), capsize=0, label=label, **look)
            best = values.argmax()
            axis.plot(x[best], values[best], **look | {"markerfacecolor": look["color"]})
            axis.plot(x, by_seed, ".", color=look["color"], markersize=points(1.5), zorder=1)
        tried = [one for curve in curves for one in curve.values()]
        bars.append((min(one.ends[0] for one in tried), max(one.ends[1] for one in tried)))
        spans.append((min(min(one.by_seed) for one in tried), max(max(one.by_seed) for one in tried)))
        axis.set_xscale("log")
        axis.minorticks_off()
        axis.set_xticks(settings, [f"{value:g}" for value in settings])
        axis.set_xlim(settings[0] / near**0.3, settings[-1] * near**0.3)
        axis.set_xlabel(_SYMBOLS[name])
        axis.set_title(methods[method].title)
    _scale([axis for axis, _ in panels], bars, spans)
    for row in axes:
        row[0].set_ylabel("validation advantage")
    legend(shown, *axes[0, 0].get_legend_handles_labels(), columns=5)
    return shown


def caption(results: dict[str, Any]) -> str:
    """What is shown."""
    return (
        f"{DATA}; mean of {seeds_of(results)}. Bars: {need(results, 'confidence'):.0%} intervals over the validation "
        "prompts of all seeds, not over training runs; dots: each seed. Each setting at its best step of each seed, so "
        r"every value is a little optimistic; filled: the best setting at a $\rho$. Curves stand side by side at a "
        "setting. A panel with a grey ground has an axis of its own: its values lie far from the others'. What single "
        "cells added beyond an end is left out. The grid of settings is ours; the paper's figure is for TL;DR."
    )


@dataclass(frozen=True)
class Tried:
    """A setting at the best step of each seed."""

    by_seed: list[float]
    error: tuple[float, float]
    """From the mean over seeds to the ends of its interval, below and above: those of the seeds, which have prompts of
    their own, by the root of the sum of squares."""

    @property
    def ends(self) -> broken.Span:
        """Of the interval."""
        return float(np.mean(self.by_seed)) - self.error[0], float(np.mean(self.by_seed)) + self.error[1]


def _scale(panels: list[Any], bars: list[broken.Span], spans: list[broken.Span]) -> None:
    """Limits by all that a panel shows: common to those whose bars lie in the part that has most of them."""
    found, main = broken.parts(bars)
    low, high = found[main]
    alike = [low <= bar[0] <= high for bar in bars]
    shown = [(min(bar[0], span[0]), max(bar[1], span[1])) for bar, span in zip(bars, spans, strict=True)]
    together = [span for span, inside in zip(shown, alike, strict=True) if inside]
    common = min(span[0] for span in together), max(span[1] for span in together)
    for axis, span, inside in zip(panels, shown, alike, strict=True):
        own = not inside
        axis.set_ylim(broken.limits(span if own else common))
        subplot = axis.get_subplotspec()
        axis.tick_params(labelleft=own or (subplot is not None and subplot.is_first_col()))
        if own:
            axis.set_facecolor("0.94")


def _curves(results: Any, method: str, rhos: Iterable[float]) -> tuple[str, list[dict[float, Tried]]]:
    """What was swept, and the settings tried at each rho."""
    curves = []
    name = ""
    for rho in rhos:
        found = cells(results, rho, method)
        name = swept(method, (entry["setting"] for cell in found for entry in need(cell, "validation")))
        by_seed = [best_steps(cell, name) for cell in found]
        if any(set(best) != set(by_seed[0]) for best in by_seed):
            raise ValueError(f"{RESULTS}: at rho {rho:g} the seeds of {method} have different settings")
        curves.append({setting: _tried([best[setting] for best in by_seed]) for setting in by_seed[0]})
    return name, curves


def _tried(entries: list[dict[str, Any]]) -> Tried:
    values = np.array([entry["advantage"] for entry in entries])
    low, high = np.array([need(entry, "ci") for entry in entries]).T
    below, above = (float(np.sqrt(np.sum(part**2)) / len(entries)) for part in (values - low, high - values))
    return Tried(by_seed=values.tolist(), error=(below, above))


def swept(method: str, settings: Iterable[Mapping[str, Any]]) -> str:
    """The one hyper-parameter in which a method's settings differ; where there is one setting, its first of those."""
    found = list(settings)
    names = list(dict.fromkeys(name for setting in found for name in setting))
    varying = [name for name in names if len({str(setting.get(name)) for setting in found}) > 1]
    names = varying or [name for name in _SYMBOLS if name in names][:1]
    if len(names) != 1 or names[0] not in _SYMBOLS:
        raise ValueError(
            f"{RESULTS}: the settings of {method} must differ in one of {', '.join(_SYMBOLS)}; "
            f"they have {', '.join(names) or 'nothing'}"
        )
    return names[0]


def best_steps(cell: dict[str, Any], name: str) -> dict[float, dict[str, Any]]:
    """Value of the hyper-parameter -> what was validated at the step of the largest advantage; of those that all cells
    tried, without what this one added beyond an end."""
    best: dict[float, dict[str, Any]] = {}
    added = [one[name] for one in cell.get("settled", {}).get("settings", [])]
    for entry in need(cell, "validation"):
        setting, advantage = need(entry, "setting", name), need(entry, "advantage")
        if setting in added:
            continue
        if setting not in best or advantage > best[setting]["advantage"]:
            best[setting] = entry
    return best
