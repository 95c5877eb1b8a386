"""N-Figure 5: training curves on held-out pairs, by method and training split."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from figures.nondeterministic import SPLITS, data_of, looks_of, title_of
from figures.style import figure, layered, legend

RESULTS = "nondeterministic.json"

_ROWS = {
    "chosen_logps": "$\\log\\pi$,\nwinners",
    "rejected_logps": "$\\log\\pi$,\nlosers",
    "accuracy": "accuracy",
    "forward_kl_reference": "KL by\nsamples",
}


def draw(results: dict[str, Any]) -> Figure:
    """A column a split, a row a quantity, a line a method."""
    looks = looks_of(results)
    lines = dict(zip(looks, layered([look.line | {"label": look.title} for look in looks.values()]), strict=True))
    shown = figure(1.25 * len(_ROWS) + 0.7)
    axes = shown.subplots(len(_ROWS), len(SPLITS), sharex=True, sharey="row", squeeze=False)
    for row, (quantity, title) in zip(axes, _ROWS.items(), strict=True):
        for axis, split in zip(row, SPLITS, strict=True):
            for name, line in lines.items():
                history = results["training"][split][name]
                # Before the first step policy and SFT are one: the sign of their log-ratios is rounding.
                trained = [entry for entry in history if quantity != "accuracy" or entry["step"] > 0]
                steps, values = [entry["step"] for entry in trained], [entry[quantity] for entry in trained]
                axis.plot(steps, values, **line)
        row[0].set_ylabel(title)
    for axis, split in zip(axes[0], SPLITS, strict=True):
        axis.set_title(title_of(results, split))
    for axis in axes[-1]:
        axis.set_xlabel("step")
    shown.align_ylabels(axes[:, 0])
    legend(shown, *axes[0, 0].get_legend_handles_labels())
    return shown


def caption(results: dict[str, Any]) -> str:
    """What is shown."""
    return (
        "Means over held-out pairs of all confidences, the same for every split; log-probs and "
        r"$\mathrm{KL}(\pi_{\mathrm{ref}}\,\|\,\pi)$ in nats, the latter by samples of SFT, which is "
        r"$\pi_{\mathrm{ref}}$. Accuracy: share of pairs whose preferred completion has the greater log-ratio to SFT, "
        "by the annotators' labels, which are not deterministic. Where lines cover each other the later method is the "
        f"narrower one on top. {data_of(results, outside=False)}"
    )
