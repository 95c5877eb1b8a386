"""The exact world: the optimum's probability of every completion against the trained policy's."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from figures.style import BLUE, GREEN, ORANGE, caption, looks_of

RESULTS = "exact.json"

_PANELS = {
    "d-dpo": "all pairs",
    "ipo": "sparse pairs",
    "p-dpo": "some in no pair",
    "dp-dpo": "some in no pair",
    "hull-dpo": "sparse pairs",
    "e-dpo": "sparse pairs",
}
"""By method: which data it is trained on."""
_MARKS = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"))


def draw(results: dict[str, Any]) -> Figure:
    """A panel a method, a point a completion, a colour and marker a prompt; on the diagonal where training arrived."""
    looks = looks_of(results, list(_PANELS), RESULTS)
    figure = Figure(figsize=(7.4, 5.2))
    axes = figure.subplots(2, 3, sharex=True, sharey=True).flat
    lowest = min(np.min(results[name][which]) for name in _PANELS for which in ("optimum", "trained"))
    for axis, (name, data) in zip(axes, _PANELS.items(), strict=True):
        entry = results[name]
        axis.plot([lowest, 1], [lowest, 1], color="0.7", linewidth=0.8, zorder=0)
        for x, (optimum, trained) in enumerate(zip(entry["optimum"], entry["trained"], strict=True)):
            colour, marker = _MARKS[x % len(_MARKS)]
            axis.plot(
                optimum,
                trained,
                marker,
                color=colour,
                markersize=3.5,
                markerfacecolor="none",
                markeredgewidth=0.7,
                label=f"prompt {x + 1}",
            )
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_title(f"{looks[name].title}, {data}\nTV {entry['tv']:.1e} (pi_ref {entry['tv_ref']:.2f})")
    for axis in figure.axes[3:]:
        axis.set_xlabel("probability in the optimum")
    for axis in figure.axes[::3]:
        axis.set_ylabel("trained probability")
    figure.axes[0].legend(fontsize=6, loc="upper left")
    caption(
        figure,
        f"Every completion of {len(results['d-dpo']['optimum'])} prompts in a language of "
        f"{len(results['d-dpo']['optimum'][0])} completions; exact KL term, optima by bandits.solve.\n"
        "TV: total variation from the optimum, largest over prompts; of pi_ref, smallest. "
        "Descent on e-DPO's minimum may end at a member that is not the best.",
    )
    return figure
