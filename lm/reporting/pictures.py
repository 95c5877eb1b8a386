"""Pictures of a report beside the training curves: the frontier of advantage and KL, and how samples are spread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from figures.record import MethodResult, Results
from figures.style import BLACK, Look
from lm.config import SFT
from lm.reporting.curves import Curve, svg

Rows = Mapping[str, Mapping[str, Any]]
"""A policy's rows of samples.jsonl, by prompt."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SPREAD = {"oracle_reward": "oracle reward", "length": "length, tokens"}
"""Columns of samples whose spread is shown."""


def frontier(results: Results) -> Curve:
    """As `draw_frontier`, for a page."""
    title = "Frontier: advantage against KL"
    return Curve(title, svg(draw_frontier(results), "frontier", title))


def draw_frontier(results: Results) -> Figure:
    """Advantage against KL: each method as it was chosen, on test prompts, with its interval; the settings and
    snapshots that it was chosen from, on validation prompts, where their KL was measured; and the best of n samples of
    pi_ref. ValueError where a method's look cannot be drawn."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axis = figure.subplots()
    axis.axhline(0, color="0.6", linewidth=0.8)
    axis.plot([0], [0], color=BLACK, marker="P", markersize=6, linestyle="none", label="SFT (π_ref)")
    for name, row in results.methods.items():
        look = Look(results.looks[name])
        for path in paths(row):
            small = {**look.line, "markersize": 2.5}
            axis.plot([kl for kl, _ in path], [gain for _, gain in path], **small, linewidth=0.7, alpha=0.6)
        low, high = row.ci
        error = [[row.advantage - low], [high - row.advantage]]
        drawn = {**look.line, "linestyle": "none", "markersize": 7}
        axis.errorbar([row.kl], [row.advantage], yerr=error, capsize=2, elinewidth=0.8, label=look.title, **drawn)
    if results.best_of_n:
        best = results.best_of_n
        axis.plot([b.kl for b in best], [b.advantage for b in best], "--x", color=BLACK, label="best of n of π_ref")
        for one in best:
            axis.annotate(f"{one.n}", (one.kl, one.advantage), xytext=(3, -8), textcoords="offset points", fontsize=7)
    axis.set_xlabel("KL(π ‖ π_ref), nats")
    axis.set_ylabel("advantage over SFT (oracle reward)")
    figure.legend(loc="outside lower center", ncols=4, fontsize=7, handlelength=3)
    return figure


def paths(row: MethodResult) -> list[list[tuple[float, float]]]:
    """KL and advantage of what a method was chosen from, of each setting its snapshots by step, as far as their KL was
    measured."""
    settings: list[dict[str, Any]] = []
    for one in row.validation:
        if one.setting not in settings:
            settings.append(one.setting)
    steps = sorted(row.validation, key=lambda one: one.step)
    found = [[(t.kl, t.advantage) for t in steps if t.setting == each and t.kl is not None] for each in settings]
    return [path for path in found if path]


def spreads(results: Results, samples: Mapping[str, Rows]) -> list[Curve]:
    """The distribution of rewards and of lengths over the test prompts, a curve a policy: the share of the samples
    that have at most so much."""
    found = []
    for column, title in SPREAD.items():
        figure = Figure(figsize=(4.6, 3.4), layout="constrained")
        axis = figure.subplots()
        for name, rows in samples.items():
            values = np.sort([row[column] for row in rows.values()])
            shares = np.arange(1, len(values) + 1) / len(values)
            look: dict[str, Any] = {"color": BLACK, "linewidth": 2.2}
            label = "SFT (π_ref)"
            if name != SFT:
                of_method = Look(results.looks[name])
                look, label = {**of_method.line, "markersize": 3, "markevery": 0.15, "linewidth": 1.1}, of_method.title
            axis.step(values, shares, where="post", label=label, **look)
        axis.set_xlabel(title)
        axis.set_ylabel("share of samples with at most so much")
        figure.legend(loc="outside lower center", ncols=3, fontsize=7, handlelength=3)
        found.append(Curve(f"Spread of {title}", svg(figure, f"spread-{column}", f"Spread of {title}")))
    return found


def quantiles(rows: Rows, column: str) -> list[float]:
    """QUANTILES of a column of a policy's samples."""
    return [float(value) for value in np.quantile([row[column] for row in rows.values()], QUANTILES)]


def distinct(rows: Rows) -> float:
    """Share of a policy's samples that it wrote for no earlier prompt."""
    return len({row["completion"] for row in rows.values()}) / len(rows)
