"""Figure B.3: which member of the ensemble e-DPO's implicit reward is closest to, over training."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from figures.grid import DATA, band, cells, need, probes, rhos_of, seeds_of
from figures.style import figure, layered, legend, points, series

RESULTS = "grid.json"


def draw(results: dict[str, Any]) -> Figure:
    """A panel a rho, a line a member: the share of probe pairs whose margin it matches best.

    Raises ValueError where a probe does not have one share a member, or there are more members than looks.
    """
    rhos, members = rhos_of(results), need(results, "members")
    labels = [{"label": f"$b = {name.removeprefix('b')}$"} for name in members]
    looks = layered([look | label for look, label in zip(series("members", members, RESULTS), labels, strict=True)])
    shown = figure(2.0)
    axes = shown.subplots(1, len(rhos), sharex=True, sharey=True, squeeze=False)[0]
    for axis, rho in zip(axes, rhos, strict=True):
        steps, shares = probes(cells(results, rho, "e-dpo"), "member_shares")
        if shares.shape[2:] != (len(members),):
            raise ValueError(
                f"{RESULTS}: member_shares must have one share for each of {', '.join(members)}, "
                f"at rho {rho:g} their shape is {shares.shape[2:]}"
            )
        for member, look in enumerate(looks):
            band(axis, steps, shares[..., member], look)
        axis.axhline(1 / len(members), color="0.6", linewidth=points(0.8), linestyle=":", zorder=0)
        axis.set_ylim(0, 1)
        axis.set_title(rf"$\rho = {rho:g}$")
        axis.set_xlabel("step")
    axes[0].set_ylabel("share of probe pairs")
    legend(shown, *axes[0].get_legend_handles_labels(), columns=5)
    return shown


def caption(results: dict[str, Any]) -> str:
    """What is shown."""
    return (
        f"{DATA}; e-DPO, mean of {seeds_of(results)}, each with its setting chosen on validation; bands: range over "
        "seeds. $b$: share of the member's training pairs that prefer the longer. Best match: the nearest reward "
        "margin, pair by pair (the loss chooses for a whole mini-batch). Dotted: chance. The paper's figure is for "
        "TL;DR."
    )
