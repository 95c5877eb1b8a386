"""N-Figure 2: DRDO's focal weight, its preference term, and the term's gradient, by the focal exponent."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from figures.style import figure, layered, points, series

RESULTS = "nondeterministic.json"

_SHOWN = 2.0
"""The exponent whose gradients are drawn, [N]'s, beside those of none."""


def draw(results: dict[str, Any]) -> Figure:
    """Three panels against log pi(y_w) - log pi(y_l): the weight, the term, minus its gradient by either log-prob."""
    focal = results["focal"]
    margin, curves = focal["margin"], focal["curves"]
    shown = figure(2.3)
    weight, term, force = shown.subplots(1, 3, sharex=True)
    for curve, look in zip(curves, layered(series("focal exponents", curves, RESULTS)), strict=True):
        line = {**look, "marker": ""}
        weight.plot(margin, curve["weight"], label=rf"$\gamma = {curve['gamma']:g}$", **line)
        term.plot(margin, curve["term"], **line)
        for side, dashes in (("chosen", "-"), ("rejected", (0, (4, 1.5)))):
            if curve["gamma"] in (0.0, _SHOWN):
                force.plot(
                    margin,
                    [-slope for slope in curve[f"{side}_gradient"]],
                    color=look["color"],
                    linestyle=dashes,
                    linewidth=points(1.8 if curve["gamma"] == _SHOWN else 0.9),
                    label=rf"$\log\pi(y_{side[0].replace('c', 'w').replace('r', 'l')})$, $\gamma = {curve['gamma']:g}$",
                )
    force.axhline(0, color="0.6", linewidth=points(0.8), zorder=0)
    weight.set_title(r"focal weight $(1 - p_w)^\gamma$")
    term.set_title("preference term of the loss")
    force.set_title("minus its gradient by")
    for axis in (weight, term, force):
        axis.axvline(0, color="0.6", linewidth=points(0.8), zorder=0)
        axis.set_xlabel(r"$\log\pi(y_w) - \log\pi(y_l)$, nats")
    for axis in (weight, force):
        axis.legend(fontsize="x-small", handlelength=2.5, borderaxespad=0)
    return shown


def caption(results: dict[str, Any]) -> str:
    """What is shown."""
    focal = results["focal"]
    return (
        rf"From theory.losses.drdo ([N] eq 6), $\alpha={focal['alpha']:g}$, the mean of both log-probs held at "
        f"{focal['mean_logp']:g} nats; gradients by automatic differentiation. Without the focal weight ($\\gamma=0$) "
        r"almost nothing acts on $\log\pi(y_l)$ at such log-probs: the weight pushes the loser down, and most where "
        "neither leads by much. The gradients are ours."
    )
