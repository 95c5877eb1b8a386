"""Figure B.1: log-probs of preferred and dispreferred completions, and both estimates of the KL, over training."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from figures.grid import DATA, band, cells, probes, rhos_of, seeds_of
from figures.style import caption, looks_of

RESULTS = "grid.json"

METHODS = ("dpo", "p-dpo", "d-dpo", "dp-dpo")
_COLUMNS = {
    "chosen_logps": r"$\log\pi$(preferred)",
    "rejected_logps": r"$\log\pi$(dispreferred)",
    "forward_kl_reference": r"KL, samples of $\pi_{\mathrm{ref}}$",
    "forward_kl_preferences": "KL, preference data",
}


def draw(results: dict[str, Any]) -> Figure:
    """A row a rho, a column a quantity, a line a method: the mean over seeds in their range."""
    rhos, looks = rhos_of(results), looks_of(results, METHODS, RESULTS)
    figure = Figure(figsize=(7.4, 1.3 * len(rhos) + 1.3))
    axes = figure.subplots(len(rhos), len(_COLUMNS), sharex=True, sharey="col", squeeze=False)
    for row, rho in zip(axes, rhos, strict=True):
        for name, look in looks.items():
            chosen = cells(results, rho, name)
            for axis, quantity in zip(row, _COLUMNS, strict=True):
                steps, values = probes(chosen, quantity)
                band(axis, steps, values, look.line | {"markersize": 3}, label=look.title)
        row[0].set_ylabel(rf"$\rho = {rho:g}$")
    for axis, title in zip(axes[0], _COLUMNS.values(), strict=True):
        axis.set_title(title)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=len(METHODS), handlelength=3.5
    )
    caption(
        figure,
        f"{DATA}; means over held-out probe pairs, nats a completion. Lines: mean of {seeds_of(results)}, each with "
        "its setting chosen on validation, as far as all of them trained; bands: range over seeds. KL is mean "
        r"$\log\pi_{\mathrm{ref}} - \log\pi$, over samples of $\pi_{\mathrm{ref}}$ or over both completions of a pair; "
        "the latter is no divergence and may be negative. The paper's figure is for TL;DR.",
    )
    return figure
