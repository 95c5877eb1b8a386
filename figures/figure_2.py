"""Figure 2: oracle advantage over pi_ref against rho, the share of training pairs that prefer the longer."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from figures.grid import DATA, cells, methods_of, need, prompts_of, rhos_of, seeds_of
from figures.style import caption

RESULTS = "grid.json"


def draw(results: dict[str, Any]) -> Figure:
    """A line a method, pooled over seeds, with its interval; dots: each seed. Methods stand side by side at a rho."""
    methods, rhos = methods_of(results), rhos_of(results)
    spacing = np.diff(rhos).min() if len(rhos) > 1 else 0.1
    offsets = spacing * 0.6 * (np.arange(len(methods)) / max(len(methods) - 1, 1) - 0.5)
    figure = Figure(figsize=(7.4, 4.4))
    axis = figure.subplots()
    axis.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    for offset, (name, look) in zip(offsets, methods.items(), strict=True):
        x = np.array(rhos) + offset
        entries = [need(results, "advantages", f"{rho:g}", name) for rho in rhos]
        values = np.array([need(entry, "advantage") for entry in entries])
        low, high = np.array([need(entry, "ci") for entry in entries]).T
        axis.errorbar(
            x, values, yerr=[values - low, high - values], label=look.title, capsize=1.5, elinewidth=0.8, **look.line
        )
        by_seed = np.array([need(entry, "by_seed") for entry in entries])
        axis.plot(x, by_seed, ".", color=look.colour, markersize=2, zorder=0)
    axis.set_xticks(rhos, [f"{rho:g}" for rho in rhos])
    axis.set_xlabel(r"$\rho$, share of training pairs in which the longer completion is preferred")
    axis.set_ylabel("advantage over SFT (oracle reward)")
    figure.legend(loc="outside upper center", ncols=4, handlelength=3.5)
    tested = [cell for rho in rhos for name in methods for cell in cells(results, rho, name)]
    caption(
        figure,
        f"{DATA}; {seeds_of(results)}, {prompts_of(tested)} test prompts each; setting and step chosen on validation. "
        f"Bars: {need(results, 'confidence'):.0%} intervals over prompts, not over training runs; dots: each seed. "
        "Hollow: learns from labels; filled: from rewards. The paper's figure is for TL;DR and far larger policies; it "
        "has neither hull-DPO nor DRDO.",
    )
    return figure
