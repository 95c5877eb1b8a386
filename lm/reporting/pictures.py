"""Pictures of a report beside the training curves: the frontier of advantage and KL, and how samples are spread."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from figures import run_frontier
from figures.record import Results
from figures.style import BLACK, Look
from lm.config import SFT
from lm.reporting.curves import Curve, svg

Rows = Mapping[str, Mapping[str, Any]]
"""A policy's rows of samples.jsonl, by prompt."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SPREAD = {"oracle_reward": "oracle reward", "length": "length, tokens"}
"""Columns of samples whose spread is shown."""


def frontier(results: Results) -> Curve:
    """As `figures.run_frontier.draw`, for a page."""
    title = "Frontier: advantage against KL"
    return Curve(title, svg(run_frontier.draw(results), "frontier", title))


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
