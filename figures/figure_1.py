"""Figure 1: among the policies that rewards ask for, the pessimistic one is closest to pi_ref in forward KL."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from figures.style import BLUE, GREEN, GREY, ORANGE, PI_REF, PURPLE, RED, figure, points

RESULTS = "figure_1.json"

_CORNERS = np.array([[0.0, 0.0], [0.5, np.sqrt(3) / 2], [1.0, 0.0]])


def _place(policies: Any) -> npt.NDArray[np.float64]:
    """Barycentric coordinates: [..., 3] probabilities -> [..., 2] points in the triangle."""
    return np.asarray(np.asarray(policies) @ _CORNERS)


def draw(results: dict[str, Any]) -> Figure:
    """The simplex: the choice of Theorem 2 for a finite set against the max-min one, and both exact optima's paths."""
    data = results["results"]
    shown = figure(3.7, columns=1)
    axis = shown.subplots()
    axis.plot(*np.vstack([_CORNERS, _CORNERS[:1]]).T, color="black", linewidth=points(0.8))
    for arm, (corner, align) in enumerate(zip(_CORNERS, ("right", "center", "left"), strict=True)):
        axis.text(corner[0], corner[1] + (0.02 if arm == 1 else -0.05), f"arm {arm + 1}", ha=align)
    axis.fill(
        *_place(data["hull"]).T,
        facecolor="0.92",
        edgecolor=GREY,
        linewidth=points(0.8),
        label=r"$\pi_r$, $r$ in the hull",
    )
    for name, colour, dashes in (("e-dpo", RED, (0, (1, 1))), ("hull-dpo", GREEN, (0, (4, 1.5)))):
        label = {"e-dpo": r"e-DPO, by $\alpha$", "hull-dpo": r"hull-DPO, by $\alpha$"}[name]
        # A jump of the best member is a jump of e-DPO's optimum: dots show it where a line would hide it.
        axis.plot(
            *_place(data["paths"][name]).T,
            color=colour,
            linestyle=dashes,
            marker=".",
            markersize=points(2.5),
            label=label,
        )
    members = _place(data["members"])
    axis.plot(*members.T, "o", color=BLUE, markersize=points(4.5), label=r"$\pi_r$ of each reward")
    for number, point in enumerate(members):
        axis.annotate(str(number + 1), point, xytext=(points(4), points(3)), textcoords="offset points", color=BLUE)
    axis.plot(*_place(data["ref"]), "k*", markersize=points(9), label=PI_REF)
    for name, marker, colour, label in (
        ("closest_member", "s", ORANGE, "closest member"),
        ("max_min", "D", PURPLE, "max-min, closest in the hull"),
    ):
        choice = data[name]
        axis.plot(
            *_place(choice["policy"]),
            marker,
            markersize=points(8),
            markerfacecolor="none",
            markeredgecolor=colour,
            markeredgewidth=points(1.4),
            linestyle="none",
            label=f"{label}:\nworst case ${choice['worst_case']:+.3f}$, KL {choice['forward_kl']:.3f}",
        )
    axis.set_aspect("equal")
    axis.axis("off")
    shown.legend(loc="outside lower left", ncols=2, columnspacing=1, handlelength=2)
    return shown


def caption(results: dict[str, Any]) -> str:
    """What is shown."""
    data, beta = results["results"], results["provenance"]["config"]["beta"]
    return (
        f"Exact policies on three arms, {len(data['members'])} rewards (ours), $\\beta={beta:g}$. Worst case: least "
        f"advantage over {PI_REF}, reverse KL subtracted; KL: forward, nats. Paths: $\\alpha$ from "
        f"{data['alphas'][0]:g} to {data['alphas'][-1]:g}, all pairs, averaged. [F]'s Figure 1 is a sketch of the same "
        "idea."
    )
