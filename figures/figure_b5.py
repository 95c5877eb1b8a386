"""Figure B.5: constant weights alpha of the KL term against the annealed one."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from figures.grid import DATA, need, prompts_of, seeds_of
from figures.style import figure, legend, looks_of, points, series

RESULTS = "grid.json"


def draw(results: dict[str, Any]) -> Figure:
    """A row a rho, a panel a method, a place a schedule: each seed with its interval, and the mean of the seeds.

    Raises ValueError where a schedule of a panel lacks a seed.
    """
    entries, seeds = need(results, "alpha"), need(results, "seeds")
    markers = [look["marker"] for look in series("seeds", seeds, RESULTS)]
    if not entries:
        raise ValueError(f"{RESULTS} has no alpha, which this figure is drawn from; run the grid that fills it")
    rhos = sorted({need(entry, "rho") for entry in entries})
    looks = looks_of(results, [need(entry, "method") for entry in entries], RESULTS)
    shown = figure(1.8 * len(rhos) + 0.5, columns=1 if len(looks) <= 2 else 2)
    axes = shown.subplots(len(rhos), len(looks), sharey=True, squeeze=False)
    for row, rho in zip(axes, rhos, strict=True):
        for axis, method in zip(row, looks, strict=True):
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
                    elinewidth=points(0.7),
                    capsize=0,
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
    hollow: dict[str, Any] = {"color": "black", "linestyle": "none", "markerfacecolor": "white"}
    handles = [Line2D([], [], marker=marker, **hollow) for marker in markers]
    legend(shown, handles, [f"seed {seed}" for seed in seeds])
    return shown


def caption(results: dict[str, Any]) -> str:
    """What is shown."""
    return (
        f"{DATA}; {seeds_of(results)}, {prompts_of(need(results, 'alpha'))} test prompts each. Bars: "
        f"{need(results, 'confidence'):.0%} intervals over prompts; lines: mean of the seeds. In the last place the "
        "weight is annealed linearly over training. The paper's figure is for TL;DR."
    )


def schedule(entry: dict[str, Any]) -> tuple[float, float]:
    """Weight of the KL term at the first and at the last step."""
    return need(entry, "alpha", "alpha_start"), need(entry, "alpha", "alpha_end")


def _name(schedule: tuple[float, float]) -> str:
    start, end = schedule
    return f"{start:g}" if start == end else f"{start:g}\nto {end:g}"
