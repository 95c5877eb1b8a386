"""N-Figure 3: win rates by sampling temperature, by training split, in and out of domain."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from figures.nondeterministic import SPLITS, data_of, domains_of, looks_of, title_of
from figures.style import BLACK, figure, legend, points

RESULTS = "nondeterministic.json"

_JUDGES = {"oracle": "oracle", "utility": "true utility"}
_OFFSET = 0.006
"""Between lines that share a temperature, so that their bars can be told apart."""


def draw(results: dict[str, Any]) -> Figure:
    """A column a split, a row a domain and judge, a line a pair of policies."""
    looks = looks_of(results)
    first, *others = results["methods"]
    pairs = [(name, first) for name in others]
    pairs += [("drdo", "e-dpo")] if {"drdo", "e-dpo"} <= set(others) else []
    judges = [judge for judge in _JUDGES if any(win["judge"] == judge for win in results["wins"])]
    rows = [(domain, judge) for domain in domains_of(results) for judge in judges]
    shown = figure(1.25 * len(rows) + 0.7)
    axes = shown.subplots(len(rows), len(SPLITS), sharex=True, sharey=True, squeeze=False)
    for line, (domain, judge) in zip(axes, rows, strict=True):
        for axis, split in zip(line, SPLITS, strict=True):
            axis.axhline(0.5, color="0.6", linewidth=points(0.8), zorder=0)
            for number, (policy, against) in enumerate(pairs):
                key = {"split": split, "domain": domain, "judge": judge, "policy": policy, "against": against}
                wins = sorted((win for win in results["wins"] if win | key == win), key=lambda win: win["temperature"])
                rate = np.array([win["rate"] for win in wins])
                low, high = np.array([win["ci"] for win in wins]).T
                look = looks[policy].line if against == first else {"color": BLACK, "linestyle": ":", "marker": "x"}
                axis.errorbar(
                    np.array([win["temperature"] for win in wins]) + _OFFSET * (number - (len(pairs) - 1) / 2),
                    rate,
                    yerr=[rate - low, high - rate],
                    label=f"{looks[policy].title} against {looks[against].title}",
                    elinewidth=points(0.8),
                    **look,
                )
        line[0].set_ylabel(f"{domains_of(results)[domain]},\nby {_JUDGES[judge]}", fontsize="small")
    for axis, split in zip(axes[0], SPLITS, strict=True):
        axis.set_title(title_of(results, split))
    for axis in axes[-1]:
        axis.set_xlabel("sampling temperature")
        axis.set_xticks(results["temperatures"])
    legend(shown, *axes[0, 0].get_legend_handles_labels(), columns=2)
    return shown


def caption(results: dict[str, Any]) -> str:
    """What is shown."""
    counts = {win["domain"]: win["n"] for win in results["wins"]}
    prompts = " and ".join(f"{counts[domain]} {title}" for domain, title in domains_of(results).items())
    return (
        f"Win rate: wins plus half the ties, of {prompts}; bars: {results['confidence']:.0%} bootstrap intervals over "
        "prompts, not over training runs. The oracle is trained in domain, and chose settings on validation prompts. "
        f"DRDO's own reward estimates come from a head, or are implicit; [N] does not say. {data_of(results)}"
    )
