"""Figure B.4: advantage on validation prompts by beta (tau for IPO)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from figures.grid import DATA, cells, methods_of, need, rhos_of, seeds_of, series
from figures.style import caption

RESULTS = "grid.json"

_SYMBOLS = {"beta": r"$\beta$", "tau": r"$\tau$", "alpha": r"$\alpha$", "gamma": r"$\gamma$"}
_COLUMNS = 4


def draw(results: dict[str, Any]) -> Figure:
    """A panel a method, a line a rho: the best step of each setting, averaged over seeds; filled: the best setting."""
    rhos, methods = rhos_of(results), methods_of(results)
    columns, rows = min(len(methods), _COLUMNS), -(-len(methods) // _COLUMNS)
    figure = Figure(figsize=(1.85 * columns, 1.75 * rows + 1.2))
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axis in axes.flat[len(methods) :]:
        axis.set_visible(False)
    for axis, (method, look_of_method) in zip(axes.flat, methods.items(), strict=False):
        ticks: set[float] = set()
        for rho, look in zip(rhos, series("rhos", rhos), strict=True):
            found = cells(results, rho, method)
            name = swept(method, (entry["setting"] for cell in found for entry in need(cell, "validation")))
            by_seed = [best_steps(cell, name) for cell in found]
            if any(set(best) != set(by_seed[0]) for best in by_seed):
                raise ValueError(f"{RESULTS}: at rho {rho:g} the seeds of {method} have different settings")
            x = sorted(by_seed[0])
            ticks.update(x)
            values = np.mean([[best[setting] for setting in x] for best in by_seed], axis=0)
            axis.plot(x, values, **look, label=rf"$\rho = {rho:g}$")
            axis.plot(x[values.argmax()], values.max(), **look | {"markerfacecolor": look["color"]})
        axis.set_xscale("log")
        axis.minorticks_off()
        axis.set_xticks(sorted(ticks), [f"{value:g}" for value in sorted(ticks)])
        axis.set_xlabel(_SYMBOLS[name])
        axis.set_title(look_of_method.title)
    for row in axes:
        row[0].set_ylabel("validation advantage")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(rhos), handlelength=3.5
    )
    caption(
        figure,
        f"{DATA}; mean of {seeds_of(results)}. Each setting at its best step of each seed, so every value is a little "
        "optimistic; filled: the best setting at a ρ. The grid of settings is ours; the paper's figure is for TL;DR.",
    )
    return figure


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


def best_steps(cell: dict[str, Any], name: str) -> dict[float, float]:
    """Value of the hyper-parameter -> the largest advantage over the steps at which it was validated."""
    best: dict[float, float] = {}
    for entry in need(cell, "validation"):
        setting, advantage = need(entry, "setting", name), need(entry, "advantage")
        best[setting] = max(best.get(setting, advantage), advantage)
    return best
