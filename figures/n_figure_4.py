"""N-Figure 4: how the advantage over pi_ref is distributed, by method, training split and domain."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from figures.nondeterministic import SPLITS, data_of, domains_of, looks_of, title_of
from figures.style import figure, layered, legend, points

RESULTS = "nondeterministic.json"


def draw(results: dict[str, Any]) -> Figure:
    """A column a split, a row a domain; a method's empirical distribution function is a line, its mean a marker on it.

    Saved are histograms, whose outermost bins hold all that is beyond: the function is known, and drawn, at the edges
    between bins only.
    """
    histograms, domains, looks = results["histograms"], domains_of(results), looks_of(results)
    lines = dict(zip(looks, layered([look.line | {"label": look.title} for look in looks.values()]), strict=True))
    edges = np.array(histograms["edges"][1:-1])
    shown = figure(1.75 * len(domains) + 0.5)
    axes = shown.subplots(len(domains), len(SPLITS), sharex=True, sharey=True, squeeze=False)
    for row, domain in zip(axes, domains, strict=True):
        for axis, split in zip(row, SPLITS, strict=True):
            axis.axvline(0, color="0.6", linewidth=points(0.8), zorder=0)
            axis.axhline(0.5, color="0.6", linewidth=points(0.8), zorder=0)
            found = {
                entry["policy"]: entry
                for entry in histograms["counts"]
                if (entry["split"], entry["domain"]) == (split, domain)
            }
            for name, line in lines.items():
                counts, mean = np.array(found[name]["counts"]), found[name]["mean"]
                share = counts.cumsum()[:-1] / counts.sum()
                axis.plot(edges, share, **line | {"marker": ""})
                on = {"linestyle": "none", "markersize": points(5), "zorder": 4, "label": None, "markevery": None}
                axis.plot([mean], [np.interp(mean, edges, share)], **line | on)
            axis.set_ylim(0, 1)
        row[0].set_ylabel(f"share of prompts,\n{domains[domain].replace('test prompts', 'in domain')}")
    for axis, split in zip(axes[0], SPLITS, strict=True):
        axis.set_title(title_of(results, split))
    for axis in axes[-1]:
        axis.set_xlabel("oracle reward less SFT's")
    legend(shown, [_handle(line) for line in lines.values()], [look.title for look in looks.values()])
    return shown


def caption(results: dict[str, Any]) -> str:
    """What is shown."""
    histograms = results["histograms"]
    return (
        "Empirical distribution functions of the oracle reward of a sample less that of SFT's for the same prompt, "
        f"temperature {histograms['temperature']:g}: the share of prompts at or below a value, so a line further right "
        "is better. Known at the edges of bins; what is beyond the outermost of them is in the lines' ends. Markers: "
        f"means. The jump at 0 holds the completions that are SFT's own. {data_of(results)}"
    )


def _handle(line: dict[str, Any]) -> Any:
    return Line2D([], [], **{key: value for key, value in line.items() if key not in ("label", "zorder", "markevery")})
