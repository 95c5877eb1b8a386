"""The frontier: advantage against the KL that it costs, for each method, with best-of-n of pi_ref as the yardstick."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.figure import Figure

from figures.captions import plain
from figures.seeds import Floats, curve, interval
from figures.studies import Frontier, FrontierPreset, Point, kl_of_best_of, read_frontier
from figures.style import PI_REF, Look, figure, handles_of, layered, legend, points

RESULTS = "study.json"
READ = read_frontier

_COLUMNS = 3
_TICKS = (0.0, 1.0, 3.0, *(lead * 10.0**power for power in range(1, 6) for lead in (1, 3)))
_YARDSTICK = {"color": "0.35", "linestyle": (0, (1, 1)), "marker": "x", "label": f"best of $n$ of {PI_REF}"}


def draw(results: Frontier) -> Figure:
    """A panel a preset: all settings and snapshots as faint points, a method's upper envelope as a line.

    The envelope is the best advantage within so much KL, a mean over seeds of what each reaches, in its interval.
    """
    presets = results.presets
    methods = [name for name in results.looks if any(name in _methods(preset) for preset in presets.values())]
    looks = {name: Look(results.looks[name]) for name in methods}
    lines = layered([look.line | {"label": look.title, "marker": ""} for look in looks.values()])
    columns = min(len(presets), _COLUMNS)
    rows = -(-len(presets) // columns)
    shown = figure((2.9 if columns < _COLUMNS else 2.2) * rows + 0.5)
    axes = shown.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(presets) :]:
        axis.set_visible(False)
    for axis, (title, preset) in zip(axes.flat, presets.items(), strict=False):
        axis.axhline(0, color="0.6", linewidth=points(0.8), zorder=0)
        for (name, look), line in zip(looks.items(), lines, strict=True):
            found = _points(preset, name)
            if not found:
                continue
            all_of = np.array([[point.kl, point.advantage] for seed in found for point in seed])
            faint = {"linestyle": "none", "markersize": points(2.5), "alpha": 0.35, "zorder": 1}
            axis.plot(*all_of.T, **look.line | faint)
            curve(axis, *envelope(found), line | {"drawstyle": "steps-post"}, results.confidence)
        kl, values = best_of(preset)
        if len(kl):
            size = {"markersize": points(3), "linewidth": points(1)}
            curve(axis, kl, values, _YARDSTICK | size, results.confidence)
        low, high = _limits(preset, results.confidence)
        axis.set_xscale("function", functions=(_root, _square))
        axis.set_xticks([at for at in _TICKS if at <= axis.get_xlim()[1]])
        axis.set_ylim(low, high)
        axis.set_title(plain(title))
    for axis in axes[:, 0]:
        axis.set_ylabel("advantage over SFT")
    for place, axis in enumerate(axes.flat):
        if place + columns >= len(presets):
            axis.set_xlabel(r"$\mathrm{KL}(\pi\,\|\,\pi_{\mathrm{ref}})$, nats")
    legend(shown, *handles_of(axes.flat))
    return shown


def caption(results: Frontier) -> str:
    """What is shown."""
    counts = sorted({len(preset.seeds) for preset in results.presets.values()})
    seeds = "one seed" if counts == [1] else f"{' or '.join(map(str, counts))} seeds"
    cut = 0
    for preset in results.presets.values():
        low, _ = _limits(preset, results.confidence)
        every = (point for name in _methods(preset) for seed in _points(preset, name) for point in seed)
        cut += sum(point.advantage < low for point in every)
    left_out = f" {cut} point{' lies' if cut == 1 else 's lie'} below the panels." if cut else ""
    bands = f"; bands: {results.confidence:.0%} intervals over seeds" if counts[-1] > 1 else ""
    return (
        f"Mean score by the judge ({plain(results.judge)}) less that of SFT, which is {PI_REF}, against the distance "
        f"from it; {seeds}, {results.n} prompts each. Faint points: every setting and snapshot of every seed. Lines: "
        f"the best within so much KL, means over seeds{bands}. A method is ahead where its line is above. "
        f"Best of $n$: the best of $n$ samples of {PI_REF} by the judge, at its bound $\\log n-(n-1)/n$. The "
        f"horizontal axis is a root.{left_out}"
    )


def envelope(seeds: Sequence[Sequence[Point]]) -> tuple[Floats, Floats]:
    """KL where any seed's envelope rises, from where all seeds have a point, [T]; and the best advantage of each seed
    at no more KL, [S, T]."""
    kl = np.unique([point.kl for seed in seeds for point in seed])
    kl = kl[kl >= max(min(point.kl for point in seed) for seed in seeds)]
    reached = []
    for seed in seeds:
        rising = sorted(seed, key=lambda point: point.kl)
        best = np.maximum.accumulate([point.advantage for point in rising])
        reached.append(best[np.searchsorted([point.kl for point in rising], kl, side="right") - 1])
    return kl, np.array(reached)


def best_of(preset: FrontierPreset) -> tuple[Floats, Floats]:
    """KL of the best of each n, [T], and its advantage by seed, [S, T]."""
    seeds = list(preset.seeds.values())
    kl = np.array([kl_of_best_of(best.n) for best in seeds[0].best_of])
    return kl, np.array([[best.advantage for best in seed.best_of] for seed in seeds])


def _methods(preset: FrontierPreset) -> list[str]:
    return list(next(iter(preset.seeds.values())).methods)


def _points(preset: FrontierPreset, method: str) -> list[list[Point]]:
    return [seed.methods[method] for seed in preset.seeds.values() if method in seed.methods]


def _limits(preset: FrontierPreset, confidence: float) -> tuple[float, float]:
    """Of the vertical axis: zero, lines, intervals, and what is above. A policy that has collapsed would stretch it."""
    drawn = [0.0, *(value for found in _drawn(preset) for value in _extent(found, confidence))]
    drawn.append(max(p.advantage for name in _methods(preset) for seed in _points(preset, name) for p in seed))
    margin = 0.05 * ((max(drawn) - min(drawn)) or 1.0)
    return min(drawn) - margin, max(drawn) + margin


def _drawn(preset: FrontierPreset) -> Iterator[Floats]:
    for values in [best_of(preset)[1], *(envelope(_points(preset, name))[1] for name in _methods(preset))]:
        if values.size:
            yield values


def _extent(values: Floats, confidence: float) -> tuple[float, float]:
    mean = values.mean(0)
    low, high = interval(values, confidence) or (mean, mean)
    return float(low.min()), float(high.max())


def _root(values: Floats) -> Floats:
    return np.sign(values) * np.sqrt(np.abs(values))


def _square(values: Floats) -> Floats:
    return np.sign(values) * np.square(values)
