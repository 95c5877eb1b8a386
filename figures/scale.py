"""What the data side costs as sets grow: CPU seconds and memory of each stage, TRL's preparation beside."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from figures.record import values_of, whole
from figures.style import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, RED, SKY, figure, legend, points

RESULTS = "scale.json"
CURE = "write it anew with `python -m lm.bench --scale --json`"
LOOKS = {
    "prepare": (BLUE, "o"),
    "diagnose": (ORANGE, "s"),
    "bias": (GREEN, "^"),
    "confidence": (RED, "v"),
    "score": (PURPLE, "D"),
    "export": (SKY, "P"),
    "load": (GREY, "X"),
    "trl": (BLACK, "*"),
}
"""By stage, in the order of the legend."""
TITLES = {"trl": "TRL's preparation"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A stage on a set of so many pairs."""

    stage: str
    pairs: int
    cpu_seconds: float
    anonymous_mb: float


@dataclass(frozen=True, kw_only=True)
class Scale:
    """scale.json."""

    rows: list[Row]
    provenance: dict[str, Any]

    def __post_init__(self) -> None:
        if not self.rows:
            raise ValueError("has no rows")
        if unknown := [row.stage for row in self.rows if row.stage not in LOOKS]:
            raise ValueError(f"has a stage {unknown[0]!r}; there are {', '.join(LOOKS)}")

    @property
    def sizes(self) -> list[int]:
        """Pairs of the sets."""
        return sorted({row.pairs for row in self.rows})


def read(path: Path) -> Scale:
    """scale.json; ValueError, which names the file and what is wrong, where it is not as above."""
    return whole(Scale, values_of(path, CURE), path, CURE)


READ = read


def draw(results: Scale) -> Figure:
    """Two panels, a line a stage, over the pairs; a line of slope 1 says what linear is."""
    shown = figure(3.0)
    axes = shown.subplots(1, 2, sharex=True)
    for stage, (colour, marker) in LOOKS.items():
        rows = sorted((row for row in results.rows if row.stage == stage), key=lambda row: row.pairs)
        if not rows:
            continue
        look = {
            "color": colour,
            "marker": marker,
            "markersize": points(4),
            "linewidth": points(1.1),
            "linestyle": "--" if stage == "trl" else "-",
            "label": TITLES.get(stage, stage),
        }
        pairs = [row.pairs for row in rows]
        axes[0].plot(pairs, [row.cpu_seconds for row in rows], **look)
        axes[1].plot(pairs, [row.anonymous_mb for row in rows], **look)
    axes[0].set_title("CPU seconds")
    axes[1].set_title("memory, MB")
    for axis in axes:
        axis.set_xscale("log")
        axis.set_xlabel("pairs")
    axes[0].set_yscale("log")
    axes[1].set_ylim(bottom=0)
    low, high = results.sizes[0], results.sizes[-1]
    cheapest = min(row.cpu_seconds for row in results.rows)
    axes[0].plot([low, high], [cheapest, cheapest * high / low], ":", color="0.7", linewidth=points(0.8), zorder=0)
    legend(shown, *axes[0].get_legend_handles_labels())
    return shown


def caption(results: Scale) -> str:
    """What is shown."""
    sizes = ", ".join(f"{size:,}" for size in results.sizes)
    return (
        f"Every stage of the data side on made pairs of TL;DR's lengths ({sizes} pairs), a process each; forward "
        "passes are left out. Left: CPU seconds, imports left out; dotted: linear. Right: the most memory that is no "
        "page of a file, libraries among it. TRL's preparation is that of its DPO trainer, from the same file."
    )
