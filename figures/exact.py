"""The exact world: the optimum's probability of every completion against the trained policy's."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from figures.style import BLUE, GREEN, ORANGE, PI_REF, figure, looks_of, points

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
    shown = figure(4.6)
    axes = shown.subplots(2, 3, sharex=True, sharey=True).flat
    lowest = min(np.min(results[name][which]) for name in _PANELS for which in ("optimum", "trained"))
    for axis, (name, data) in zip(axes, _PANELS.items(), strict=True):
        entry = results[name]
        axis.plot([lowest, 1], [lowest, 1], color="0.7", linewidth=points(0.8), zorder=0)
        for x, (optimum, trained) in enumerate(zip(entry["optimum"], entry["trained"], strict=True)):
            colour, marker = _MARKS[x % len(_MARKS)]
            axis.plot(
                optimum,
                trained,
                marker,
                color=colour,
                markersize=points(2.5),
                markerfacecolor="none",
                markeredgewidth=points(0.6),
                label=f"prompt {x + 1}",
            )
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_title(f"{looks[name].title}, {data}\nTV {entry['tv']:.1e} ({PI_REF} {entry['tv_ref']:.2f})")
    for axis in shown.axes[3:]:
        axis.set_xlabel("probability in the optimum")
    for axis in shown.axes[::3]:
        axis.set_ylabel("trained probability")
    shown.axes[0].legend(loc="upper left", handletextpad=0.1, borderaxespad=0)
    return shown


def caption(results: dict[str, Any]) -> str:
    """What is shown."""
    prompts, completions = np.shape(results["d-dpo"]["optimum"])
    return (
        f"Every completion of {prompts} prompts in a language of {completions} completions, a point each: trained "
        "against optimal probability, with the exact KL term; optima by bandits.solve. TV: total variation from the "
        f"optimum, the largest over prompts; in brackets that of {PI_REF}, the smallest. Descent on e-DPO's minimum "
        "may end at a member that is not the best."
    )
