"""Figure B.5: constant weights alpha of the KL term against the annealed one."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from figures.grid import DATA, need, prompts_of, seeds_of, series
from figures.style import caption, looks_of

RESULTS = "grid.json"


def draw(results: dict[str, Any]) -> Figure:
    """A row a rho, a panel a method, a place a schedule: each seed with its interval, and the mean of the seeds.

    Raises ValueError where a schedule of a panel lacks a seed.
    """
    entries, seeds = need(results, "alpha"), need(results, "seeds")
    markers = [look["marker"] for look in series("seeds", seeds)]
    if not entries:
        raise ValueError(f"{RESULTS} has no alpha, which this figure is drawn from; run the grid that fills it")
    rhos = sorted({need(entry, "rho") for entry in entries})
    methods = list(dict.fromkeys(need(entry, "method") for entry in entries))
    looks = looks_of(results, methods, RESULTS)
    figure = Figure(figsize=(max(2.3 * len(methods), 4.0), 2.1 * len(rhos) + 1.0))
    axes = figure.subplots(len(rhos), len(methods), sharey=True, squeeze=False)
    for row, rho in zip(axes, rhos, strict=True):
        for axis, method in zip(row, methods, strict=True):
            panel = {
                (schedule(entry), entry["seed"]): need(entry, "test")
                for entry in entries
                if entry["rho"] == rho and entry["method"] == method
            }
            schedules = sorted({at for at, _ in panel}, key=lambda at: (at[0] != at[1], at))
            for at, seed in ((at, seed) for at in schedules for seed in seeds):
                if (at, seed) not in panel:
                    raise ValueError(f"{RESULTS}.alpha has no seed {seed} of {method} at rho {rho:g}, alpha {at}")
            offsets = 0.3 * (np.arange(len(seeds)) - (len(seeds) - 1) / 2) / max(len(seeds) - 1, 1)
            for offset, seed, marker in zip(offsets, seeds, markers, strict=True):
                values = np.array([need(panel[at, seed], "advantage") for at in schedules])
                low, high = np.array([need(panel[at, seed], "ci") for at in schedules]).T
                axis.errorbar(
                    np.arange(len(schedules)) + offset,
                    values,
                    yerr=[values - low, high - values],
                    fmt=marker,
                    color=looks[method].colour,
                    markerfacecolor="white",
                    markersize=4.2,
                    elinewidth=0.7,
                )
            means = [np.mean([panel[at, seed]["advantage"] for seed in seeds]) for at in schedules]
            axis.hlines(
                means, np.arange(len(schedules)) - 0.35, np.arange(len(schedules)) + 0.35, color="black", label="mean"
            )
            axis.set_xticks(range(len(schedules)), [_name(at) for at in schedules])
            axis.set_xlim(-0.6, len(schedules) - 0.4)
            axis.set_title(rf"{looks[method].title}, $\rho = {rho:g}$")
        row[0].set_ylabel("advantage over SFT")
    for axis in axes[-1]:
        axis.set_xlabel(r"$\alpha$")
    hollow: dict[str, Any] = {"color": "black", "linestyle": "none", "markerfacecolor": "white", "markersize": 4.2}
    handles = [
        Line2D([], [], marker=marker, label=f"seed {seed}", **hollow)
        for seed, marker in zip(seeds, markers, strict=True)
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(seeds))
    caption(
        figure,
        f"{DATA}; {seeds_of(results)}, {prompts_of(entries)} test prompts each. Bars: "
        f"{need(results, 'confidence'):.0%} intervals over prompts; lines: mean of the seeds. In the last "
        "place the weight is annealed linearly over training. The paper's figure is for TL;DR; its "
        "constants are lost in our copy.",
    )
    return figure


def schedule(entry: dict[str, Any]) -> tuple[float, float]:
    """Weight of the KL term at the first and at the last step."""
    return need(entry, "alpha", "alpha_start"), need(entry, "alpha", "alpha_end")


def _name(schedule: tuple[float, float]) -> str:
    start, end = schedule
    return f"{start:g}" if start == end else f"{start:g}\nto {end:g}"
