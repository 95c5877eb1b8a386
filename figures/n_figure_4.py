"""N-Figure 4: histograms of the advantage over pi_ref, by method, training split and domain."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from figures.nondeterministic import SPLITS, data_of, domains_of, looks_of, title_of
from figures.style import caption

RESULTS = "nondeterministic.json"


def draw(results: dict[str, Any]) -> Figure:
    """A column a split, a row a domain; an outline a method, its mean a line of the same look."""
    histograms, domains, looks = results["histograms"], domains_of(results), looks_of(results)
    figure = Figure(figsize=(7.4, 1.9 * len(domains) + 1.2))
    axes = figure.subplots(len(domains), len(SPLITS), sharex=True, sharey="row", squeeze=False)
    for line, domain in zip(axes, domains, strict=True):
        for axis, split in zip(line, SPLITS, strict=True):
            for row in histograms["counts"]:
                if (row["split"], row["domain"]) != (split, domain):
                    continue
                look = looks[row["policy"]]
                shown = {"color": look.colour, "linestyle": look.dashes}
                share = [count / sum(row["counts"]) for count in row["counts"]]
                axis.stairs(share, histograms["edges"], linewidth=1.2, label=f"{row['mean']:+.2f}", **shown)
                axis.axvline(row["mean"], linewidth=0.9, **shown)
            axis.legend(title="means", title_fontsize=6, fontsize=6, loc="upper right", handlelength=2.5)
        line[0].set_ylabel(f"share of prompts,\n{domains[domain].replace('test prompts', 'in domain')}")
    for axis, split in zip(axes[0], SPLITS, strict=True):
        axis.set_title(title_of(results, split))
    for axis in axes[-1]:
        axis.set_xlabel("oracle reward less SFT's")
    titles = [look.title for look in looks.values()]
    figure.legend(axes[0, 0].patches, titles, loc="outside upper center", ncols=len(titles), handlelength=3.5)
    caption(
        figure,
        f"Oracle reward of a sample less that of SFT's for the same prompt, temperature {histograms['temperature']:g}; "
        "the outermost bins hold what is beyond them; at 0 are also the completions that are SFT's own; vertical "
        f"lines: means. {data_of(results)}",
    )
    return figure
