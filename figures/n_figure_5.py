"""N-Figure 5: training curves on held-out pairs, by method and training split."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from figures.nondeterministic import SPLITS, data_of, looks_of, title_of
from figures.style import caption

RESULTS = "nondeterministic.json"

_ROWS = {
    "chosen_logps": r"$\log\pi$(preferred)",
    "rejected_logps": r"$\log\pi$(dispreferred)",
    "accuracy": "accuracy",
    "forward_kl_reference": r"KL($\pi_{ref}\|\pi$)",
}


def draw(results: dict[str, Any]) -> Figure:
    """A column a split, a row a quantity, a line a method."""
    looks = looks_of(results)
    figure = Figure(figsize=(7.4, 1.35 * len(_ROWS) + 1.3))
    axes = figure.subplots(len(_ROWS), len(SPLITS), sharex=True, sharey="row", squeeze=False)
    for line, (quantity, title) in zip(axes, _ROWS.items(), strict=True):
        for axis, split in zip(line, SPLITS, strict=True):
            for name, history in results["training"][split].items():
                # Before the first step policy and SFT are one: the sign of their log-ratios is rounding.
                shown = [entry for entry in history if quantity != "accuracy" or entry["step"] > 0]
                steps, values = [entry["step"] for entry in shown], [entry[quantity] for entry in shown]
                axis.plot(steps, values, label=looks[name].title, **{**looks[name].line, "markersize": 3})
        line[0].set_ylabel(title)
    for axis, split in zip(axes[0], SPLITS, strict=True):
        axis.set_title(title_of(results, split))
    for axis in axes[-1]:
        axis.set_xlabel("step")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=4, handlelength=3.5)
    caption(
        figure,
        "Means over held-out pairs of all confidences, the same for every split; log-probs and KL in nats, KL by "
        "samples of SFT. Accuracy: share of pairs whose preferred completion has the greater log-ratio to SFT, by the "
        f"annotators' labels, which are not deterministic. {data_of(results, outside=False)}",
    )
    return figure
