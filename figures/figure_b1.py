"""Figure B.1: log-probs of preferred and dispreferred completions, and both estimates of the KL, over training."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from figures.grid import DATA, band, cells, probes, rhos_of, seeds_of
from figures.style import figure, layered, legend, looks_of

RESULTS = "grid.json"

METHODS = ("dpo", "p-dpo", "d-dpo", "dp-dpo")
_COLUMNS = {
    "chosen_logps": "$\\log\\pi$,\nwinners",
    "rejected_logps": "$\\log\\pi$,\nlosers",
    "forward_kl_reference": "KL by\nsamples",
    "forward_kl_preferences": "KL by\npairs",
}


def draw(results: dict[str, Any]) -> Figure:
    """A row a quantity, a column a rho, a line a method: the mean over seeds in their range."""
    rhos, looks = rhos_of(results), looks_of(results, METHODS, RESULTS)
    lines = layered([look.line | {"label": look.title} for look in looks.values()])
    shown = figure(1.15 * len(_COLUMNS) + 0.7)
    axes = shown.subplots(len(_COLUMNS), len(rhos), sharex=True, sharey="row", squeeze=False)
    for column, rho in zip(axes.T, rhos, strict=True):
        for name, line in zip(looks, lines, strict=True):
            chosen = cells(results, rho, name)
            for axis, quantity in zip(column, _COLUMNS, strict=True):
                steps, values = probes(chosen, quantity)
                band(axis, steps, values, line)
        column[0].set_title(rf"$\rho = {rho:g}$")
        column[-1].set_xlabel("step")
    for axis, title in zip(axes[:, 0], _COLUMNS.values(), strict=True):
        axis.set_ylabel(title)
    shown.align_ylabels(axes[:, 0])
    legend(shown, *axes[0, 0].get_legend_handles_labels())
    return shown


def caption(results: dict[str, Any]) -> str:
    """What is shown."""
    return (
        f"{DATA}; means over held-out probe pairs, nats a completion. Lines: mean of {seeds_of(results)}, each with "
        "its setting chosen on validation, as far as all of them trained; bands: range over seeds. Where lines cover "
        "each other the later method is the narrower one on top. KL is the mean of "
        r"$\log\pi_{\mathrm{ref}}-\log\pi$, over samples of $\pi_{\mathrm{ref}}$ or over both completions of a pair; "
        "the latter is no divergence and may be negative. The paper's figure is for TL;DR."
    )
