"""Oracle advantage of every method over pi_ref with its interval, mean length, and distance from pi_ref."""

from __future__ import annotations

from matplotlib.figure import Figure

from figures import record
from figures.style import Look, figure, points

RESULTS = "demo.json"
READ = record.read


def draw(results: record.Results) -> Figure:
    """Three panels that share the methods' axis: advantage with interval, mean length, KL(pi || pi_ref).

    Args:
        results: of `python -m lm.train`.
    """
    looks = {name: Look(results.looks[name]) for name in results.looks if name in results.methods}
    shown = figure(0.22 * len(looks) + 0.55)
    advantage, length, divergence = shown.subplots(1, 3, sharey=True, width_ratios=[2, 1, 1])
    for row, (name, look) in enumerate(reversed(looks.items())):
        found = results.methods[name]
        low, high = found.ci
        error = [[found.advantage - low], [high - found.advantage]]
        mark = look.line | {"linestyle": "none", "markersize": points(4.5)}
        advantage.errorbar([found.advantage], [row], xerr=error, elinewidth=points(1), **mark)
        # Hollow bars are of those that learn from labels, as hollow markers are.
        face = "white" if look.hollow else look.colour
        for axis, value in ((length, found.length), (divergence, found.kl)):
            axis.barh(row, value, color=face, edgecolor=look.colour, height=0.6, linewidth=points(1))
    advantage.axvline(0, color="0.6", linewidth=points(0.8), zorder=0)
    advantage.set_yticks(range(len(looks)), [look.title for look in reversed(looks.values())])
    advantage.set_xlabel("advantage over SFT (oracle reward)")
    length.axvline(results.sft.length, color="black", linestyle="--", linewidth=points(0.8))
    length.set_xlabel("tokens (dashed: SFT)")
    divergence.set_xlabel(r"$\mathrm{KL}(\pi\,\|\,\pi_{\mathrm{ref}})$, nats")
    return shown


def caption(results: record.Results) -> str:
    """What is shown."""
    rho = "Unbiased pairs" if results.rho is None else rf"$\rho={results.rho:g}$"
    return (
        f"{rho}, {results.sft.n} test prompts, seed {results.provenance.seed}. Bars at the markers: "
        f"{results.confidence:.0%} intervals over prompts. Hollow: learns from labels; filled: from rewards."
    )
