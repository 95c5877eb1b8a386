"""Figure 2: oracle advantage over pi_ref against rho, the share of training pairs that prefer the longer."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from figures import broken
from figures.grid import DATA, cells, methods_of, need, prompts_of, rhos_of, seeds_of
from figures.seeds import interval
from figures.style import figure, legend, points

RESULTS = "grid.json"


def draw(results: dict[str, Any]) -> Figure:
    """A line a method, the mean over seeds, with its interval; dots: each seed. Methods stand side by side at a rho.

    The axis is broken where a few values, or the zero of pi_ref, lie so far off that the others would be flattened.
    """
    methods, rhos = methods_of(results), rhos_of(results)
    spacing = np.diff(rhos).min() if len(rhos) > 1 else 0.1
    offsets = spacing * 0.4 * (np.arange(len(methods)) / max(len(methods) - 1, 1) - 0.5)
    found = {name: [_entry(results, rho, name) for rho in rhos] for name in methods}
    confidence = need(results, "confidence")
    shown = figure(3.4)
    axes = broken.axes(shown, _spans(results))
    for axis in axes:
        axis.axhline(0, color="0.6", linewidth=points(0.8), zorder=0)
        for offset, (name, look) in zip(offsets, methods.items(), strict=True):
            x = np.array(rhos) + offset
            values = np.array([np.mean(entry["by_seed"]) for entry in found[name]])
            low, high = np.array([_interval(entry, confidence) for entry in found[name]]).T
            errors = [values - low, high - values]
            axis.errorbar(x, values, yerr=errors, label=look.title, elinewidth=points(0.8), **look.line)
            by_seed = np.array([entry["by_seed"] for entry in found[name]])
            axis.plot(x, by_seed, ".", color=look.colour, markersize=points(1.8), zorder=0)
    axes[-1].set_xticks(rhos, [f"{rho:g}" for rho in rhos])
    axes[-1].set_xlabel(r"$\rho$, share of training pairs in which the longer completion is preferred")
    shown.supylabel("advantage over SFT (oracle reward)", fontsize="medium")
    legend(shown, *axes[0].get_legend_handles_labels())
    return shown


def caption(results: dict[str, Any]) -> str:
    """What is shown."""
    tested = [cell for rho in rhos_of(results) for name in methods_of(results) for cell in cells(results, rho, name)]
    whole = len(broken.parts(_spans(results))[0]) == 1
    strokes = "" if whole else " Slanted strokes: the axis is broken, and its parts have scales of their own."
    return (
        f"{DATA}; {seeds_of(results)}, {prompts_of(tested)} test prompts each; setting and step chosen on validation. "
        f"Bars: {need(results, 'confidence'):.0%} intervals over {_over(results)}; dots: each seed. "
        f"Hollow: learns from labels; filled: from rewards.{strokes} "
        "The paper's figure is for TL;DR and far larger policies; it has neither hull-DPO nor DRDO."
    )


def _spans(results: dict[str, Any]) -> list[broken.Span]:
    """Of what is drawn of each method at each rho, and of pi_ref's zero."""
    confidence = need(results, "confidence")
    entries = [_entry(results, rho, name) for rho in rhos_of(results) for name in methods_of(results)]
    drawn = [[*_interval(entry, confidence), *entry["by_seed"]] for entry in entries]
    return [(min(values), max(values)) for values in drawn] + [(0.0, 0.0)]


def _entry(results: dict[str, Any], rho: float, name: str) -> dict[str, Any]:
    entry = need(results, "advantages", f"{rho:g}", name)
    return {key: need(entry, key) for key in ("ci", "by_seed")}


def _interval(entry: dict[str, Any], confidence: float) -> tuple[float, float]:
    """Of the mean: over seeds, each with a world and prompts of its own; of one seed over its prompts."""
    ends = interval(entry["by_seed"], confidence) or entry["ci"]
    return float(ends[0]), float(ends[1])


def _over(results: dict[str, Any]) -> str:
    many = len(need(results, "seeds")) > 1
    return "seeds, each with a world and prompts of its own" if many else "prompts, not over training runs"
