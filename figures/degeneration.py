"""Degeneration gallery: probability of winner, loser and unseen strings along gradient descent."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from figures.style import BLUE, GREY, ORANGE, RED, figure, layered, legend, points

RESULTS = "degeneration.json"

_TITLES = {"dpo": "DPO", "p-dpo": "p-DPO", "d-dpo": "d-DPO", "ipo": "IPO"}
_ROWS = {"free": "a logit a string", "shared": "a logit a token"}


def draw(results: dict[str, Any]) -> Figure:
    """A column an objective, a row a parametrisation; dotted: the exact tabular optimum."""
    data = results["results"]
    strings, winner, loser = data["strings"], data["winner"], data["loser"]
    unseen = [string for string in strings if string not in (winner, loser)]
    drawn = {
        winner: (f"winner {winner}", BLUE, "-"),
        loser: (f"loser {loser}", RED, (0, (4, 1.5))),
        unseen[0]: (f"unseen {unseen[0]}", ORANGE, (0, (1, 1))),
        unseen[1]: (f"unseen {unseen[1]}", GREY, (0, (5, 1, 1, 1))),
    }
    lines = layered([{"label": label, "color": color, "linestyle": dashes} for label, color, dashes in drawn.values()])
    looks = dict(zip(drawn, lines, strict=True))
    shown = figure(3.3)
    axes = shown.subplots(2, len(data["paths"]), sharex=True, sharey=True)
    for column, (name, paths) in enumerate(data["paths"].items()):
        for axis, (kind, title) in zip(axes[:, column], _ROWS.items(), strict=True):
            probabilities = np.exp(np.array(paths[kind]))
            for string, look in looks.items():
                at = strings.index(string)
                axis.plot(data["steps"], probabilities[:, at], **look)
                if kind == "free" and data["optima"][name] is not None:
                    exact = {"color": look["color"], "linewidth": points(0.6), "linestyle": ":"}
                    axis.axhline(data["optima"][name][at], **exact)
            axis.set_xscale("symlog", linthresh=1)
            axis.set_ylim(-0.02, 1.02)
            if column == 0:
                axis.set_ylabel(f"probability\n({title})")
        axes[0, column].set_title(_TITLES[name])
        axes[1, column].set_xlabel("gradient step")
    legend(shown, *axes[0, 0].get_legend_handles_labels())
    return shown


def caption(results: dict[str, Any]) -> str:
    """What is shown."""
    data, config = results["results"], results["provenance"]["config"]
    return (
        f"One pair, {data['winner']} preferred to {data['loser']}, from the uniform reference; "
        rf"$\beta={config['beta']:g}$, $\tau={config['tau']:g}$, $\alpha={config['alpha']:g}$, "
        f"reward margin {config['reward_margin']:g}, step size {config['rate']:g}. Dotted: the exact tabular optimum; "
        "DPO has none, those of d-DPO and IPO fix the margin only, shown is the limit of a vanishing KL. Ours, not in "
        "the papers."
    )
