"""Degeneration gallery: probability of winner, loser and unseen strings along gradient descent."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from figures.style import BLUE, GREY, ORANGE, RED, caption

RESULTS = "degeneration.json"

_TITLES = {"dpo": "DPO", "p-dpo": "p-DPO", "d-dpo": "d-DPO", "ipo": "IPO"}
_ROWS = {"free": "a logit a string", "shared": "a logit a token"}


def draw(results: dict[str, Any]) -> Figure:
    """A column an objective, a row a parametrisation; dotted: the exact tabular optimum."""
    data, config = results["results"], results["provenance"]["config"]
    strings, winner, loser = data["strings"], data["winner"], data["loser"]
    unseen = [string for string in strings if string not in (winner, loser)]
    looks = {
        winner: (f"winner {winner}", BLUE, "-"),
        loser: (f"loser {loser}", RED, (0, (4, 1.5))),
        unseen[0]: (f"unseen {unseen[0]}", ORANGE, (0, (1, 1))),
        unseen[1]: (f"unseen {unseen[1]}", GREY, (0, (5, 1, 1, 1))),
    }
    figure = Figure(figsize=(7.4, 4.0))
    axes = figure.subplots(2, len(data["paths"]), sharex=True, sharey=True)
    for column, (name, paths) in enumerate(data["paths"].items()):
        for axis, (kind, title) in zip(axes[:, column], _ROWS.items(), strict=True):
            probabilities = np.exp(np.array(paths[kind]))
            for string, (label, colour, dashes) in looks.items():
                at = strings.index(string)
                axis.plot(data["steps"], probabilities[:, at], color=colour, linestyle=dashes, label=label)
                if kind == "free" and data["optima"][name] is not None:
                    axis.axhline(data["optima"][name][at], color=colour, linewidth=0.6, linestyle=":")
            axis.set_xscale("symlog", linthresh=1)
            axis.set_ylim(-0.02, 1.02)
            if column == 0:
                axis.set_ylabel(f"probability\n({title})")
        axes[0, column].set_title(_TITLES[name])
        axes[1, column].set_xlabel("gradient step")
    axes[0, 0].legend(fontsize=6, loc="upper left")
    caption(
        figure,
        f"One pair, {winner} preferred to {loser}, from the uniform reference; β = {config['beta']:g}, "
        f"τ = {config['tau']:g}, α = {config['alpha']:g}, reward margin {config['reward_margin']:g}, "
        f"step size {config['rate']:g}.\nDotted: the exact tabular optimum; DPO has none, "
        "those of d-DPO and IPO fix the margin only, shown is the limit of a "
        "vanishing KL.\nOurs, not in the papers.",
    )
    return figure
