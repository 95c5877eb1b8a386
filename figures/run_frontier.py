"""A run's frontier: what each method gains over pi_ref against how far it goes from it."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from figures import record
from figures.style import PI_REF, Look, figure, points

RESULTS = "demo.json"
READ = record.read


def draw(results: record.Results) -> Figure:
    """Each method as it was chosen, on test prompts, with its interval; the settings and snapshots that it was chosen
    from, on validation prompts, as far as their KL was measured; and the best of n samples of pi_ref.

    Args:
        results: of `python -m lm.train`.

    Raises:
        ValueError: a method's look cannot be drawn.
    """
    shown = figure(3.3)
    axis = shown.subplots()
    axis.axhline(0, color="0.6", linewidth=points(0.8), zorder=0)
    axis.plot([0], [0], color="black", marker="P", markersize=points(5), linestyle="none", label=f"SFT ({PI_REF})")
    for name in (known for known in results.looks if known in results.methods):
        row, look = results.methods[name], Look(results.looks[name])
        for path in paths(row):
            small = {**look.line, "markersize": points(2.2), "linewidth": points(0.7), "alpha": 0.45}
            axis.plot([kl for kl, _ in path], [gain for _, gain in path], **small)
        low, high = row.ci
        error = [[row.advantage - low], [high - row.advantage]]
        drawn = {**look.line, "linestyle": "none", "markersize": points(5.5), "zorder": 4}
        axis.errorbar([row.kl], [row.advantage], yerr=error, elinewidth=points(1), label=look.title, **drawn)
    if results.best_of_n:
        best = results.best_of_n
        line: dict[str, Any] = {"color": "0.35", "linestyle": (0, (1, 1)), "marker": "x", "markersize": points(3)}
        axis.plot([b.kl for b in best], [b.advantage for b in best], label=f"best of $n$ of {PI_REF}", **line)
        for one in best:
            place: dict[str, Any] = {"xytext": (points(3), points(-7)), "textcoords": "offset points"}
            axis.annotate(f"{one.n}", (one.kl, one.advantage), fontsize="x-small", **place)
    axis.set_xlabel(r"$\mathrm{KL}(\pi\,\|\,\pi_{\mathrm{ref}})$, nats")
    axis.set_ylabel("advantage over SFT (oracle reward)")
    shown.legend(loc="outside right upper")
    return shown


def caption(results: record.Results) -> str:
    """What is shown."""
    rho = "Unbiased pairs" if results.rho is None else rf"$\rho={results.rho:g}$"
    tried = any(paths(row) for row in results.methods.values())
    small = " Small: the settings and steps that it was chosen from, on validation prompts." if tried else ""
    best = " Best of $n$: on validation prompts, at its bound $\\log n-(n-1)/n$." if results.best_of_n else ""
    return (
        f"{rho}, seed {results.provenance.seed}. Large: each method as validation chose it, on {results.sft.n} test "
        f"prompts, bars {results.confidence:.0%} intervals over prompts.{small}{best} A method is ahead where it gains "
        "more at no more KL."
    )


def paths(row: record.MethodResult) -> list[list[tuple[float, float]]]:
    """KL and advantage of what a method was chosen from, of each setting its snapshots by step, as far as their KL was
    measured."""
    settings: list[dict[str, Any]] = []
    for one in row.validation:
        if one.setting not in settings:
            settings.append(one.setting)
    steps = sorted(row.validation, key=lambda one: one.step)
    found = [[(t.kl, t.advantage) for t in steps if t.setting == each and t.kl is not None] for each in settings]
    return [path for path in found if path]
