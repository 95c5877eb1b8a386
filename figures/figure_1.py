"""Figure 1: among the policies that rewards ask for, the pessimistic one is closest to pi_ref in forward KL."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from figures.style import BLUE, GREEN, GREY, ORANGE, PURPLE, RED, caption

RESULTS = "figure_1.json"

_CORNERS = np.array([[0.0, 0.0], [0.5, np.sqrt(3) / 2], [1.0, 0.0]])


def _place(policies: Any) -> npt.NDArray[np.float64]:
    """Barycentric coordinates: [..., 3] probabilities -> [..., 2] points in the triangle."""
    return np.asarray(np.asarray(policies) @ _CORNERS)


def draw(results: dict[str, Any]) -> Figure:
    """The simplex: the choice of Theorem 2 for a finite set against the max-min one, and both exact optima's paths."""
    data, beta = results["results"], results["provenance"]["config"]["beta"]
    figure = Figure(figsize=(5.4, 5.6))
    axis = figure.subplots()
    axis.plot(*np.vstack([_CORNERS, _CORNERS[:1]]).T, color="black", linewidth=0.8)
    for arm, (corner, align) in enumerate(zip(_CORNERS, ("right", "center", "left"), strict=True)):
        axis.text(corner[0], corner[1] + (0.02 if arm == 1 else -0.05), f"arm {arm + 1}", ha=align)
    axis.fill(
        *_place(data["hull"]).T, facecolor="0.92", edgecolor=GREY, linewidth=0.8, label=r"$\pi_r$, $r$ in the hull"
    )
    for name, colour, dashes in (("e-dpo", RED, (0, (1, 1))), ("hull-dpo", GREEN, (0, (4, 1.5)))):
        label = {"e-dpo": "e-DPO, by α", "hull-dpo": "hull-DPO, by α"}[name]
        # A jump of the best member is a jump of e-DPO's optimum: dots show it where a line would hide it.
        axis.plot(*_place(data["paths"][name]).T, color=colour, linestyle=dashes, marker=".", markersize=3, label=label)
    members = _place(data["members"])
    axis.plot(*members.T, "o", color=BLUE, markersize=6, label=r"$\pi_r$ of each reward")
    for number, point in enumerate(members):
        axis.annotate(str(number + 1), point, xytext=(5, 4), textcoords="offset points", color=BLUE)
    axis.plot(*_place(data["ref"]), "k*", markersize=11, label=r"$\pi_{\mathrm{ref}}$")
    for name, marker, colour, label in (
        ("closest_member", "s", ORANGE, "closest member"),
        ("max_min", "D", PURPLE, "max-min = closest in the hull"),
    ):
        choice = data[name]
        axis.plot(
            *_place(choice["policy"]),
            marker,
            markersize=10,
            markerfacecolor="none",
            markeredgecolor=colour,
            markeredgewidth=1.8,
            linestyle="none",
            label=f"{label}: worst case {choice['worst_case']:+.3f}, KL {choice['forward_kl']:.3f}",
        )
    axis.set_aspect("equal")
    axis.axis("off")
    figure.legend(loc="outside upper left", ncols=2, fontsize=7)
    caption(
        figure,
        f"Exact policies on three arms, {len(members)} rewards (ours), β = {beta:g}. Worst case: least advantage over "
        "pi_ref,\nreverse KL subtracted; KL: forward, nats. Paths: α from "
        f"{data['alphas'][0]:g} to {data['alphas'][-1]:g}, all pairs, averaged.\n"
        "[F]'s Figure 1 is a sketch of the same idea.",
    )
    return figure
