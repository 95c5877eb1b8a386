"""Figure B.2: arm weights of IPO and p-DPO, preference chain against its transitive closure."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from figures.style import BLUE, ORANGE, figure, legend, points

RESULTS = "figure_b2.json"

_BARS = {"chain": {"color": BLUE}, "closure": {"color": ORANGE, "hatch": "////"}}


def draw(results: dict[str, Any]) -> Figure:
    """A row of panels for IPO, one by tau, and a row by beta for p-DPO, one by alpha."""
    config, rows = results["provenance"]["config"], results["results"]
    grid: list[list[dict[str, Any]]] = [[{"objective": "ipo", "tau": tau} for tau in config["tau"]]]
    grid += [[{"objective": "p-dpo", "beta": beta, "alpha": a} for a in config["alpha"]] for beta in config["beta"]]
    columns = max(len(row) for row in grid)
    shown = figure(1.15 * len(grid) + 0.5)
    axes = shown.subplots(len(grid), columns, sharey=True, squeeze=False)
    positions = np.arange(config["arms"])
    for line, settings in zip(axes, grid, strict=True):
        for axis in line[len(settings) :]:
            axis.set_visible(False)
        for axis, setting in zip(line, settings, strict=False):
            weights = {}
            for offset, (data, look) in zip((-0.2, 0.2), _BARS.items(), strict=True):
                (row,) = [r for r in rows if r["data"] == data and all(r[k] == v for k, v in setting.items())]
                weights[data] = np.array(row["weights"])
                axis.bar(
                    positions + offset, weights[data], 0.4, label=data, edgecolor="black", linewidth=points(0.5), **look
                )
            distance = np.abs(weights["chain"] - weights["closure"]).sum() / 2
            symbol = "tau" if setting["objective"] == "ipo" else "alpha"
            axis.set_title(rf"$\{symbol}={setting[symbol]:g}$: TV {distance:.3f}")
            axis.set_xticks(positions, [str(arm + 1) for arm in positions])
            axis.set_ylim(0, 1)
        first = settings[0]
        row_name = "IPO" if first["objective"] == "ipo" else f"p-DPO\n$\\beta={first['beta']:g}$"
        line[0].set_ylabel(row_name)
    legend(shown, *axes[0, 0].get_legend_handles_labels())
    return shown


def caption(results: dict[str, Any]) -> str:
    """What is shown."""
    config = results["provenance"]["config"]
    reading = "averaged (expectation)" if config["reduction"] == "mean" else "summed"
    return (
        f"Arm weights of the exact optimum, {config['arms']} arms, uniform reference; pair losses {reading}; a "
        "chain of preferences against its transitive closure. TV: total variation between the two. IPO without a KL "
        r"term; p-DPO with one of weight $\alpha$. The grid of settings is ours."
    )
