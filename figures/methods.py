"""Oracle advantage of every method over pi_ref with its interval, mean length, and distance from pi_ref."""

from __future__ import annotations

from matplotlib.figure import Figure

from figures import record

RESULTS = "demo.json"
READ = record.read


def draw(results: record.Results) -> Figure:
    """Three panels that share the methods' axis: advantage with interval, mean length, KL(pi || pi_ref).

    Args:
        results: of `python -m lm.train`.
    """
    methods = results.methods
    names = list(methods)[::-1]
    rows = range(len(names))
    figure = Figure(figsize=(9, 0.36 * len(names) + 1.7), layout="constrained")
    advantage, length, divergence = figure.subplots(1, 3, sharey=True, width_ratios=[2, 1, 1])
    values = [methods[name].advantage for name in names]
    low, high = zip(*(methods[name].ci for name in names), strict=True)
    errors = [
        [value - bound for value, bound in zip(values, low, strict=True)],
        [bound - value for value, bound in zip(values, high, strict=True)],
    ]
    advantage.errorbar(values, rows, xerr=errors, fmt="o", color="black", capsize=3, markersize=5)
    advantage.axvline(0, color="0.6", linewidth=0.8)
    advantage.set_yticks(rows, names)
    advantage.set_xlabel(f"advantage over SFT (oracle reward), {results.confidence:.0%} interval")
    length.barh(rows, [methods[name].length for name in names], color="0.75", edgecolor="black", height=0.6)
    length.axvline(results.sft.length, color="black", linestyle="--", linewidth=0.8)
    length.set_xlabel("tokens (dashed: SFT)")
    divergence.barh(
        rows, [methods[name].kl for name in names], color="white", edgecolor="black", hatch="//", height=0.6
    )
    divergence.set_xlabel("KL to reference, nats")
    rho = "unbiased pairs" if results.rho is None else f"$\\rho$ = {results.rho:g}"
    figure.suptitle(f"{rho}, {results.sft.n} test prompts, seed {results.provenance.seed}", fontsize=10)
    return figure
